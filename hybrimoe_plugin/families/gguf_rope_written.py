"""Rotary embeddings written to GGUF files, from transformers' parameters."""

from __future__ import annotations

import math
from typing import Any

import torch

from hybrimoe_plugin.families.gguf_rope import FACTORS, LONG_FACTORS, MSCALE, SHORT_FACTORS
from hybrimoe_plugin.families.rope import (
    FULL,
    SLIDING,
    Parameters,
    fixed_frequencies,
    frequencies,
    with_own_base,
)

_UNTURNED = 1e30
"""Factor of pairs that do not turn, as converters write it."""


def rope_metadata(config: Any, mscale: bool) -> dict[str, Any]:
    """Metadata of a config's rotary embedding; factors of single frequencies are tensors.

    Args:
        config: of the model, with `rope_parameters`.
        mscale: as for `read_rope`.
    """
    rope, width = main_rope(config)
    scaling: dict[str, Any] = {}
    if rope["rope_type"] == "linear":
        scaling = {"type": "linear", "factor": float(rope["factor"])}
    elif rope["rope_type"] == "yarn":
        scaling = _yarn_metadata(rope, width, mscale)
    elif rope["rope_type"] == "longrope" and frequencies(rope, width) is None:
        scaling = {
            "type": "longrope",
            "attn_factor": _long_scaling(config, rope),
            "original_context_length": rope["original_max_position_embeddings"],
        }
    values = {
        "rope.freq_base": float(rope["rope_theta"]),
        **{f"rope.scaling.{key}": value for key, value in scaling.items()},
    }
    if SLIDING in config.rope_parameters:
        values["rope.freq_base_swa"] = float(config.rope_parameters[SLIDING]["rope_theta"])
    return values


def rope_tensors(config: Any) -> dict[str, torch.Tensor]:
    """What frequencies are divided by, where that is not one number for all."""
    rope, width = main_rope(config)
    if rope["rope_type"] not in ("llama3", "longrope", "proportional"):
        return {}
    found = frequencies(rope, width)
    if found is None:  # they depend on the context's length
        return {
            LONG_FACTORS: torch.tensor(rope["long_factor"]),
            SHORT_FACTORS: torch.tensor(rope["short_factor"]),
        }
    unscaled = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    plain = fixed_frequencies(unscaled, width)
    return {FACTORS: (plain.angles / found.angles).clamp(max=_UNTURNED)}


def _yarn_metadata(rope: Parameters, width: int, mscale: bool) -> dict[str, Any]:
    values = {
        "type": "yarn",
        "factor": float(rope["factor"]),
        "original_context_length": rope["original_max_position_embeddings"],
    }
    if rope.get("beta_fast") is not None:
        values["yarn_beta_fast"] = float(rope["beta_fast"])
    if rope.get("beta_slow") is not None:
        values["yarn_beta_slow"] = float(rope["beta_slow"])
    scale = rope.get("mscale") or 0.0
    all_dims = rope.get("mscale_all_dim") or 0.0
    if mscale and all_dims:
        values["yarn_log_multiplier"] = MSCALE * all_dims
    # Readers take one `mscale` for both, and of most families none: the factor then says it.
    understood = scale == all_dims if mscale else scale == all_dims == 0
    if rope.get("attention_factor") is not None or not understood:
        values["yarn_attn_factor"] = fixed_frequencies(rope, width).scaling
    return values


def main_rope(config: Any) -> tuple[Parameters, int]:
    """The embedding that most keys are about, and the dimensions of a head that have it.

    Where those of layer types differ, it is that of layers with full attention.
    """
    rope = config.rope_parameters
    if FULL not in rope:
        width = _width(config)
        return with_own_base(rope, width), width
    return rope[FULL], _width(config.per_layer_config[FULL])


def _width(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    if size:
        return int(size)
    return int(config.hidden_size // config.num_attention_heads)


def _long_scaling(config: Any, rope: Parameters) -> float:
    """What transformers multiplies cosines and sines by under `longrope`."""
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))
