"""Rotary embeddings of every kind, as transformers' parameters and as GGUF metadata."""

from __future__ import annotations

from typing import Any, NamedTuple

import tiny

THETA = {"rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", **THETA, "factor": 3.0}
YARN = {"rope_type": "yarn", **THETA, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    **THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


class Kind(NamedTuple):
    """One rotary embedding, in both words."""

    parameters: dict[str, Any]
    keys: dict[str, Any]


ROPES = {
    "linear": Kind(LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}),
    "linear, old key": Kind(LINEAR, {"rope.scale_linear": 3.0}),
    "yarn": Kind({**YARN, "beta_fast": 32.0, "beta_slow": 1.0}, YARN_KEYS),
    "yarn, betas": Kind(
        {**YARN, "beta_fast": 8.0, "beta_slow": 3.0},
        {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 3.0},
    ),
    "yarn, attention factor": Kind(
        {**YARN, "attention_factor": 1.4},
        {**YARN_KEYS, "rope.scaling.yarn_attn_factor": 1.4},
    ),
    "yarn, mscale": Kind(
        {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.0707},
    ),
    "llama3": Kind({**LLAMA3, "original_max_position_embeddings": 8192}, {}),
    "other factors": Kind({**LLAMA3, "original_max_position_embeddings": 64}, {}),
}


def with_rope(family: str, parameters: dict[str, Any]) -> Any:
    """A tiny model with this rotary embedding."""
    # transformers needs to be told the heads' size for Mixtral with yarn.
    size = {"head_dim": 16} if family == "mixtral" else {}
    return tiny.model(family, rope_parameters=parameters, **size)
