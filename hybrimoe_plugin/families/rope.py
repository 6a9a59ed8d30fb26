"""Rotary embeddings: from what a GGUF file states to transformers' parameters, and whether two of
them agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.families.gguf_facts import Facts

FACTORS = "rope_freqs.weight"
_OLD_FREQUENCIES = "attn_rot_embd.weight"
_WIDEST = 1 << 16

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all released Llama 3 models have besides their factor, and what llama.cpp's converter takes
for granted.
"""


class Rope(NamedTuple):
    """Rotary embedding of a file."""

    parameters: dict[str, Any]
    """transformers' `rope_parameters`."""
    width: int
    """Dimensions of a head that are turned."""
    has_base: bool
    """Whether the file states the base; else it is llama.cpp's default."""
    has_scaling: bool
    """Whether it states a scaling, also that there is none."""


def read_rope(facts: Facts, width: int) -> Rope:
    """The rotary embedding that the file describes; what transformers has no parameters for is
    noted as refused.

    Raises:
        WeightsError: a value out of range.
    """
    if width % 2 or not 2 <= width <= _WIDEST:
        raise facts.wrong(
            "rope.dimension_count", f"expected an even number from 2 to {_WIDEST}", width
        )
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": facts.number("rope.freq_base", 10000.0),
    }
    _check_old_frequencies(facts, parameters, width)
    scaling = _scaling(facts)
    factors = _factors(facts, width)
    if factors is not None and scaling:
        facts.refuse(f"tensor {FACTORS} beside {facts.architecture}.rope.scaling")
    elif factors is not None:
        scaling = _by_factors(parameters, factors, facts.integer("context_length", 4096, least=1))
    keys = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
    stated = factors is not None or any(map(facts.has, keys))
    return Rope({**parameters, **scaling}, width, facts.has("rope.freq_base"), stated)


def difference(config: Any, rope: Rope) -> str | None:
    """What of a file's rotary embedding contradicts a config, both named; None if they agree.

    What a file does not state contradicts nothing.
    """
    ours, theirs = config.rope_parameters, rope.parameters
    if not isinstance(ours, Mapping) or "rope_theta" not in ours:
        return f"rope_parameters is {ours} there and {theirs} in the GGUF"
    if (
        rope.has_base
        and abs(ours["rope_theta"] - theirs["rope_theta"]) > 1e-5 * theirs["rope_theta"]
    ):
        return f"rope_theta is {ours['rope_theta']} there and {theirs['rope_theta']} in the GGUF"
    if rope.has_scaling and not _alike(
        ours, {**theirs, "rope_theta": ours["rope_theta"]}, rope.width
    ):
        return f"rope_parameters is {_brief(ours)} there and {_brief(theirs)} in the GGUF"
    return None


def frequencies(parameters: Mapping[str, Any], width: int) -> tuple[torch.Tensor, float] | None:
    """Angles per position, float32 [width / 2], and what cosines and sines are multiplied by.

    None for a kind whose angles depend on the context's length.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind == "default":
        powers = torch.arange(0, width, 2, dtype=torch.float32) / width
        return 1.0 / (parameters["rope_theta"] ** powers), 1.0
    if kind not in ("linear", "yarn", "llama3", "longrope"):
        return None
    if kind == "longrope" and parameters["short_factor"] != parameters["long_factor"]:
        return None
    config: Any = SimpleNamespace(
        rope_parameters=dict(parameters),
        head_dim=width,
        hidden_size=width,
        num_attention_heads=1,
        max_position_embeddings=parameters.get("original_max_position_embeddings", 4096),
        standardize_rope_params=lambda: None,
    )
    angles, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return angles, float(scaling)


def _alike(ours: Mapping[str, Any], theirs: Mapping[str, Any], width: int) -> bool:
    mine, stated = frequencies(ours, width), frequencies(theirs, width)
    assert stated is not None
    if mine is None or not torch.allclose(mine[0], stated[0], rtol=1e-4, atol=0):
        return False
    if theirs["rope_type"] != "yarn":
        return math.isclose(mine[1], stated[1], rel_tol=1e-4)
    # Of `mscale` files state nothing: how it relates to `mscale_all_dim` is for the config to say.
    scale = theirs.get("mscale_all_dim")
    if scale is not None and not math.isclose(
        ours.get("mscale_all_dim") or 0.0, scale, rel_tol=1e-4
    ):
        return False
    return "attention_factor" not in theirs or math.isclose(mine[1], stated[1], rel_tol=1e-4)


def _angles(parameters: Mapping[str, Any], width: int) -> torch.Tensor:
    found = frequencies(parameters, width)
    assert found is not None
    return found[0]


def _scaling(facts: Facts) -> dict[str, Any]:
    """The parameters beyond those of an unscaled embedding, by llama.cpp's rules: without a kind it
    is linear.
    """
    kind = facts.get("rope.scaling.type", "linear")
    facts.get("rope.scaling.original_context_length")  # which only yarn takes into account
    key = "rope.scaling.factor" if facts.has("rope.scaling.factor") else "rope.scale_linear"
    if kind == "none":
        facts.get(key)
        return {}
    if kind == "linear":
        stated = facts.number(key, 1.0, positive=False)
        factor = 1.0 if stated == 0 else facts.number(key, 1.0)  # 0 is "not set"
        facts.only("rope.scale_linear", stated, f"{key} is {stated:g}")
        return {} if factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(facts)
    facts.refuse(f"{facts.architecture}.rope.scaling.type is {kind!r}")
    return {}


def _yarn(facts: Facts) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": facts.number("rope.scaling.factor"),
        "original_max_position_embeddings": facts.integer(
            "rope.scaling.original_context_length",
            facts.integer("context_length", 4096, least=1),
            least=1,
        ),
        "beta_fast": facts.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": facts.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if facts.has("rope.scaling.yarn_attn_factor"):
        parameters["attention_factor"] = facts.number("rope.scaling.yarn_attn_factor")
    if (
        facts.number("rope.scaling.yarn_ext_factor", 1.0, positive=False) >= 0
    ):  # below 0 it is "not set"
        facts.only("rope.scaling.yarn_ext_factor", 1.0, "only 1 is what transformers computes")
    if facts.architecture == "deepseek2":
        # llama.cpp stores 0.1 * mscale_all_dim, and nothing of mscale: released models have the
        # same for both.
        scale = facts.number("rope.scaling.yarn_log_multiplier", 0.0, positive=False) / 0.1
        if scale:
            parameters.update(mscale=scale, mscale_all_dim=scale)
    return parameters


def _factors(facts: Facts, width: int) -> torch.Tensor | None:
    """What frequencies are divided by, [width / 2]; None where the file has nothing of the kind, or
    only ones.
    """
    if FACTORS not in facts.store.tensors:
        return None
    values = _vector(facts, FACTORS, width // 2)
    if values is None or not bool((torch.isfinite(values) & (values > 0)).all()):
        facts.refuse(
            f"tensor {FACTORS} does not hold {width // 2} factors above 0, as heads have {width} "
            f"dimensions"
        )
        return None
    return None if bool((values == 1).all()) else values


def _by_factors(
    parameters: Mapping[str, Any], factors: torch.Tensor, context: int
) -> dict[str, Any]:
    """Llama 3's parameters where they give these factors, else the factors themselves."""
    llama3 = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    width = 2 * len(factors)
    wanted = _angles(parameters, width) / factors
    if torch.allclose(_angles({**parameters, **llama3}, width), wanted, rtol=1e-5, atol=0):
        return llama3
    # Long and short are the same, so that the context's length does not matter.
    listed = factors.tolist()
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": listed,
        "long_factor": listed,
        "original_max_position_embeddings": context,
    }


def _check_old_frequencies(facts: Facts, parameters: Mapping[str, Any], width: int) -> None:
    """Old converters store the unscaled frequencies of every layer, which are computed here."""
    for name in (name for name in facts.store.tensors if name.endswith(f".{_OLD_FREQUENCIES}")):
        values = _vector(facts, name, width // 2)
        if values is None or not torch.allclose(
            values, _angles(parameters, width), rtol=1e-2, atol=0
        ):
            facts.refuse(
                f"tensor {name} is not the frequencies of rope.freq_base "
                f"{parameters['rope_theta']:g}"
            )


def _vector(facts: Facts, name: str, count: int) -> torch.Tensor | None:
    """A tensor of `count` values, [count] float32; None if it has another number of them."""
    if math.prod(facts.store.info(name).shape) != count:
        return None
    return facts.store.dequantized(name).flatten()


def _brief(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """With long lists left out."""
    return {
        key: f"{len(value)} factors" if isinstance(value, list) else value
        for key, value in parameters.items()
    }
