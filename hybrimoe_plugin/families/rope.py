"""Rotary embeddings: frequencies of transformers' parameters, and whether two agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

_CLOSE = 1e-4
"""Relative difference of frequencies and scales that files cause by rounding to float32."""
_CLOSE_BASE = 1e-5


BETAS = ("beta_fast", "beta_slow")
"""Where yarn's ramp begins and ends."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, as transformers' configs name them."""
Parameters = Mapping[str, Any]
"""transformers' `rope_parameters`."""


class Frequencies(NamedTuple):
    """How fast the pairs of a head turn with the position."""

    angles: torch.Tensor
    """Per position, float32 [width / 2]."""
    scaling: float
    """What cosines and sines are multiplied by."""


class Rope(NamedTuple):
    """Rotary embedding of a file."""

    parameters: dict[str, Any]
    width: int
    """Dimensions of a head that have a rotary embedding."""
    has_base: bool
    """Whether the file states the base; else it is llama.cpp's default."""
    has_scaling: bool
    """Whether it states a scaling, also that there is none."""


def with_own_base(parameters: Parameters, width: int) -> Parameters:
    """The same embedding with nothing but a base, where `dynamic` with an `alpha` says it so.

    transformers' Hunyuan reads it as a base that `alpha` makes larger, once and for all lengths.
    """
    if parameters.get("rope_type") != "dynamic" or not parameters.get("alpha"):
        return parameters
    try:
        base = parameters["rope_theta"] * parameters["alpha"] ** (width / (width - 2))
    except (ArithmeticError, TypeError):  # no embedding at all, as transformers will say too
        return parameters
    return {"rope_type": "default", "rope_theta": base}


def frequencies(parameters: Parameters, width: int) -> Frequencies | None:
    """Of `width` dimensions of a head; None where they depend on the context's length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind == "default":
        powers = torch.arange(0, width, 2, dtype=torch.float32) / width
        angles = 1.0 / (parameters["rope_theta"] ** powers)
        return Frequencies(angles, 1.0)
    if kind not in ("linear", "yarn", "llama3", "longrope", "proportional"):
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
    return Frequencies(angles, float(scaling))


def fixed_frequencies(parameters: Parameters, width: int) -> Frequencies:
    """As `frequencies`, of a kind that is known not to depend on the context's length."""
    found = frequencies(parameters, width)
    assert found is not None, parameters
    return found


def joined_parameters(ropes: Mapping[str, Rope]) -> dict[str, Any]:
    """`rope_parameters` of embeddings by type of layer; "" is the one that all layers have."""
    if "" in ropes:
        return ropes[""].parameters
    return {kind: rope.parameters for kind, rope in ropes.items()}


def difference(config: Any, ropes: Mapping[str, Rope]) -> str | None:
    """What of a file's rotary embeddings contradicts a config, both named; None if they agree.

    What a file does not state contradicts nothing.

    Args:
        ropes: by type of layer, or "" for that of all layers.
    """
    whole = config.rope_parameters
    for kind, rope in ropes.items():
        ours = whole if not kind or not isinstance(whole, Mapping) else whole.get(kind)
        found = _difference(ours, rope)
        if found is not None:
            return found
    return None


def _difference(ours: Any, rope: Rope) -> str | None:
    theirs = rope.parameters
    if not isinstance(ours, Mapping) or "rope_theta" not in ours:
        return _both("rope_parameters", ours, theirs)
    ours = with_own_base(ours, rope.width)
    base, stated = ours["rope_theta"], theirs["rope_theta"]
    if rope.has_base and not math.isclose(base, stated, rel_tol=_CLOSE_BASE):
        return _both("rope_theta", base, stated)
    scaled = {**theirs, "rope_theta": base}
    if rope.has_scaling and not _alike(ours, scaled, rope.width):
        return _both("rope_parameters", _brief(ours), _brief(theirs))
    return None


def _both(name: str, ours: Any, theirs: Any) -> str:
    return f"{name} is {ours} there and {theirs} in the GGUF"


def _alike(ours: Parameters, theirs: Parameters, width: int) -> bool:
    if theirs["rope_type"] == "yarn":
        # Most converters leave these out, whatever the model has.
        theirs = {**{name: ours[name] for name in BETAS if name in ours}, **theirs}
    mine = frequencies(ours, width)
    if mine is None or frequencies(theirs, width) is None:
        return _alike_by_context(ours, theirs, width)
    stated = fixed_frequencies(theirs, width)
    if not torch.allclose(mine.angles, stated.angles, rtol=_CLOSE, atol=0):
        return False
    same_scaling = math.isclose(mine.scaling, stated.scaling, rel_tol=_CLOSE)
    if theirs["rope_type"] != "yarn":
        return same_scaling
    # Of `mscale` files state nothing: how it relates to `mscale_all_dim` is for the config to say.
    wanted = theirs.get("mscale_all_dim")
    if wanted is not None:
        given = ours.get("mscale_all_dim") or 0.0
        if not math.isclose(given, wanted, rel_tol=_CLOSE):
            return False
    return "attention_factor" not in theirs or same_scaling


def _alike_by_context(ours: Parameters, theirs: Parameters, width: int) -> bool:
    """Of embeddings of which one depends on the length of the text."""
    original = "original_max_position_embeddings"
    if not ours.get("rope_type") == theirs["rope_type"] == "longrope":
        return False
    if ours.get(original) != theirs[original]:
        return False
    for name in ("short_factor", "long_factor"):
        one, other = (
            {**each, "short_factor": each[name], "long_factor": each[name]}
            for each in (ours, theirs)
        )
        if not _alike(one, other, width):
            return False
    return True


def _brief(parameters: Parameters) -> dict[str, Any]:
    """With long lists left out."""
    shown = dict(parameters)
    for key, value in parameters.items():
        if isinstance(value, list):
            shown[key] = f"{len(value)} factors"
    return shown
