"""Rotary embeddings in GGUF files, read into transformers' parameters."""

from __future__ import annotations

import math
from typing import Any

import torch

from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.rope import BETAS, Parameters, Rope, fixed_frequencies

FACTORS = "rope_freqs.weight"
"""What frequencies are divided by, where that is not one number for all."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""The same for texts that are longer than the context of the first training, and for others."""
OLD_FREQUENCIES = "attn_rot_embd.weight"
"""Of a layer: its unscaled frequencies, as old converters store them."""

_WIDEST = 1 << 16
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all released Llama 3 models have besides their factor; llama.cpp's converter assumes it."""
_NEVER = 1e20
"""Factors from here on stand for pairs that do not turn."""
_SCALING_KEYS = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
MSCALE = 0.1
"""llama.cpp stores this times `mscale_all_dim`."""


def read_rope(
    facts: Facts,
    width: int,
    mscale: bool = False,
    proportional: bool = False,
    by_context: bool = False,
) -> Rope:
    """The rotary embedding that the file describes.

    What transformers has no parameters for is noted as refused.

    Args:
        facts: the file's metadata.
        width: dimensions of a head that have a rotary embedding.
        mscale: whether files of the family state yarn's `mscale_all_dim`.
        proportional: whether factors may leave the last pairs of a head as they are.
        by_context: whether factors may depend on the length of the text; the family reads
            `rope.scaling.attn_factor` then.

    Raises:
        WeightsError: a value out of range.
    """
    if width % 2 or not 2 <= width <= _WIDEST:
        expected = f"expected an even number from 2 to {_WIDEST}"
        raise facts.wrong("rope.dimension_count", expected, width)
    base = facts.number("rope.freq_base", 10000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    _check_old_frequencies(facts, parameters, width)
    scaling = _scaling(facts, mscale, by_context)
    factors = _factors(facts, width, FACTORS)
    if LONG_FACTORS in facts.store.tensors or SHORT_FACTORS in facts.store.tensors:
        scaling = _by_context(facts, width, by_context)
    elif factors is not None and scaling:
        facts.refuse(f"tensor {FACTORS} beside {facts.architecture}.rope.scaling")
    elif factors is not None:
        context = facts.integer("context_length", 4096, least=1)
        scaling = _proportional(factors) if proportional else {}
        scaling = scaling or _by_factors(parameters, factors, context)
    return Rope(
        {**parameters, **scaling},
        width,
        has_base=facts.has("rope.freq_base"),
        has_scaling="rope_type" in scaling or any(map(facts.has, _SCALING_KEYS)),
    )


def read_sliding_rope(facts: Facts, width: int) -> Rope:
    """That of layers with a sliding window, in files where it is another one; never scaled.

    Args:
        width: dimensions of a head, all of which have it.
    """
    base = facts.number("rope.freq_base_swa", 10000.0)
    parameters = {"rope_type": "default", "rope_theta": base}
    return Rope(parameters, width, has_base=facts.has("rope.freq_base_swa"), has_scaling=True)


def _scaling(facts: Facts, mscale: bool, by_context: bool) -> dict[str, Any]:
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
    if kind == "longrope" and by_context and LONG_FACTORS in facts.store.tensors:
        return {}  # the tensors say all of it
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
    }
    for name in BETAS:  # 32 and 1 where nobody states them
        if facts.has(f"rope.scaling.yarn_{name}"):
            parameters[name] = facts.number(f"rope.scaling.yarn_{name}")
    if facts.has("rope.scaling.yarn_attn_factor"):
        parameters["attention_factor"] = facts.number("rope.scaling.yarn_attn_factor")
    key = "rope.scaling.yarn_ext_factor"
    extrapolation = facts.number(key, 1.0, positive=False)
    if extrapolation >= 0:  # below 0 it is "not set"
        facts.only(key, 1.0, "only 1 is what transformers computes")
    if mscale:
        # Files say nothing of mscale: released models have the same for both.
        scale = facts.number("rope.scaling.yarn_log_multiplier", 0.0, positive=False) / MSCALE
        if scale:
            parameters["mscale"] = parameters["mscale_all_dim"] = scale
    return parameters


def _by_context(facts: Facts, width: int, allowed: bool) -> dict[str, Any]:
    """The parameters of an embedding that depends on the length of the text."""
    if not allowed or FACTORS in facts.store.tensors:
        facts.refuse(f"tensors {LONG_FACTORS} and {SHORT_FACTORS}")
        return {}
    found: dict[str, Any] = {"rope_type": "longrope"}
    for name, tensor in (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS)):
        factors = _factors(facts, width, tensor)
        found[name] = [1.0] * (width // 2) if factors is None else factors.tolist()
    key = "rope.scaling.original_context_length"
    found["original_max_position_embeddings"] = facts.integer(key, least=1)
    return found


def _factors(facts: Facts, width: int, name: str) -> torch.Tensor | None:
    """What frequencies are divided by, [width / 2]; None where the file has none, or only ones."""
    if name not in facts.store.tensors:
        return None
    count = width // 2
    values = _vector(facts, name, count)
    if values is None or not torch.isfinite(values).all() or not (values > 0).all():
        facts.refuse(
            f"tensor {name} does not hold {count} factors above 0, as heads have {width} dimensions"
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
