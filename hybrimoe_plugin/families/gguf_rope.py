"""Rotary embeddings in GGUF files, read into transformers' parameters and written from them."""

from __future__ import annotations

import math
from typing import Any

import torch

from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.rope import (
    FULL,
    SLIDING,
    Parameters,
    Rope,
    fixed_frequencies,
    frequencies,
)

FACTORS = "rope_freqs.weight"
"""What frequencies are divided by, where that is not one number for all."""
OLD_FREQUENCIES = "attn_rot_embd.weight"
"""Of a layer: its unscaled frequencies, as old converters store them."""

_WIDEST = 1 << 16
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all released Llama 3 models have besides their factor; llama.cpp's converter assumes it."""
_UNTURNED = 1e30
"""Factor of pairs that do not turn, as converters write it."""
_NEVER = 1e20
"""What is understood as such a factor."""
_SCALING_KEYS = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
_MSCALE = 0.1
"""llama.cpp stores this times `mscale_all_dim`."""


def read_rope(facts: Facts, width: int, mscale: bool = False, proportional: bool = False) -> Rope:
    """The rotary embedding that the file describes.

    What transformers has no parameters for is noted as refused.

    Args:
        facts: the file's metadata.
        width: dimensions of a head that have a rotary embedding.
        mscale: whether files of the family state yarn's `mscale_all_dim`.
        proportional: whether factors may leave the last pairs of a head as they are.

    Raises:
        WeightsError: a value out of range.
    """
    if width % 2 or not 2 <= width <= _WIDEST:
        expected = f"expected an even number from 2 to {_WIDEST}"
        raise facts.wrong("rope.dimension_count", expected, width)
    base = facts.number("rope.freq_base", 10000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    _check_old_frequencies(facts, parameters, width)
    scaling = _scaling(facts, mscale)
    factors = _factors(facts, width)
    if factors is not None and scaling:
        facts.refuse(f"tensor {FACTORS} beside {facts.architecture}.rope.scaling")
    elif factors is not None:
        context = facts.integer("context_length", 4096, least=1)
        scaling = _proportional(factors) if proportional else {}
        scaling = scaling or _by_factors(parameters, factors, context)
    return Rope(
        {**parameters, **scaling},
        width,
        has_base=facts.has("rope.freq_base"),
        has_scaling=factors is not None or any(map(facts.has, _SCALING_KEYS)),
    )


def read_sliding_rope(facts: Facts, width: int) -> Rope:
    """That of layers with a sliding window, in files where it is another one; never scaled.

    Args:
        width: dimensions of a head, all of which have it.
    """
    base = facts.number("rope.freq_base_swa", 10000.0)
    parameters = {"rope_type": "default", "rope_theta": base}
    return Rope(parameters, width, has_base=facts.has("rope.freq_base_swa"), has_scaling=True)


def _scaling(facts: Facts, mscale: bool) -> dict[str, Any]:
    """The parameters beyond an unscaled embedding's.

    By llama.cpp's rules scaling without a type is linear.
    """
    kind = facts.get("rope.scaling.type", "linear")
    # Only yarn takes this into account; it is read so that it is not refused with others.
    facts.get("rope.scaling.original_context_length")
    key = "rope.scaling.factor"
    if not facts.has(key):
        key = "rope.scale_linear"  # its older name
    if kind == "none":
        facts.get(key)
        return {}
    if kind == "yarn":
        return _yarn(facts, mscale)
    if kind != "linear":
        facts.refuse(f"{facts.architecture}.rope.scaling.type is {kind!r}")
        return {}
    factor = facts.number(key, 1.0, positive=False)
    facts.only("rope.scale_linear", factor, f"{key} is {factor:g}")
    if factor in (0, 1):  # 0 is "not set"
        return {}
    factor = facts.number(key)
    return {"rope_type": "linear", "factor": factor}


def _yarn(facts: Facts, mscale: bool) -> dict[str, Any]:
    context = facts.integer("context_length", 4096, least=1)
    original = facts.integer("rope.scaling.original_context_length", context, least=1)
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": facts.number("rope.scaling.factor"),
        "original_max_position_embeddings": original,
        "beta_fast": facts.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": facts.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if facts.has("rope.scaling.yarn_attn_factor"):
        parameters["attention_factor"] = facts.number("rope.scaling.yarn_attn_factor")
    key = "rope.scaling.yarn_ext_factor"
    extrapolation = facts.number(key, 1.0, positive=False)
    if extrapolation >= 0:  # below 0 it is "not set"
        facts.only(key, 1.0, "only 1 is what transformers computes")
    if mscale:
        # Files say nothing of mscale: released models have the same for both.
        scale = facts.number("rope.scaling.yarn_log_multiplier", 0.0, positive=False) / _MSCALE
        if scale:
            parameters["mscale"] = parameters["mscale_all_dim"] = scale
    return parameters


def _factors(facts: Facts, width: int) -> torch.Tensor | None:
    """What frequencies are divided by, [width / 2]; None where the file has none, or only ones."""
    if FACTORS not in facts.store.tensors:
        return None
    count = width // 2
    values = _vector(facts, FACTORS, count)
    if values is None or not torch.isfinite(values).all() or not (values > 0).all():
        facts.refuse(
            f"tensor {FACTORS} does not hold {count} factors above 0, "
            f"as heads have {width} dimensions"
        )
        return None
    if (values == 1).all():
        return None
    return values


def _proportional(factors: torch.Tensor) -> dict[str, Any]:
    """Parameters of an embedding of the first pairs alone; empty if the factors ask for more."""
    turned = int((factors == 1).sum())
    if not (factors[:turned] == 1).all() or not (factors[turned:] >= _NEVER).all():
        return {}
    width = 2 * len(factors)
    share = 2 * turned / width
    if share * width // 2 < turned:  # rounded down, and transformers would do so again
        share = math.nextafter(share, 1.0)
    return {"rope_type": "proportional", "partial_rotary_factor": share}


def _by_factors(parameters: Parameters, factors: torch.Tensor, context: int) -> dict[str, Any]:
    """Llama 3's parameters where they give these factors, else the factors themselves."""
    width = 2 * len(factors)
    wanted = fixed_frequencies(parameters, width).angles / factors
    llama3 = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    found = fixed_frequencies({**parameters, **llama3}, width)
    if torch.allclose(found.angles, wanted, rtol=1e-5, atol=0):
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


def _check_old_frequencies(facts: Facts, parameters: Parameters, width: int) -> None:
    """Note a refusal of old frequencies that are not those which are computed here."""
    end = f".{OLD_FREQUENCIES}"
    names = [name for name in facts.store.tensors if name.endswith(end)]
    if not names:
        return
    computed = fixed_frequencies(parameters, width).angles
    base = parameters["rope_theta"]
    for name in names:
        values = _vector(facts, name, width // 2)
        if values is None or not torch.allclose(values, computed, rtol=1e-2, atol=0):
            facts.refuse(f"tensor {name} is not the frequencies of rope.freq_base {base:g}")


def _vector(facts: Facts, name: str, count: int) -> torch.Tensor | None:
    """A tensor of `count` values, [count] float32; None if it has another number of them.

    The shape is looked at first: a damaged file may state a huge one.
    """
    store = facts.store
    if math.prod(store.info(name).shape) != count:
        return None
    return store.dequantized(name).flatten()


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
            "rope_factors_long.weight": torch.tensor(rope["long_factor"]),
            "rope_factors_short.weight": torch.tensor(rope["short_factor"]),
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
        values["yarn_log_multiplier"] = _MSCALE * all_dims
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
        return rope, _width(config)
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
