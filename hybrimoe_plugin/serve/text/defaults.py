"""How tokens are drawn where a request does not say: as the model's own files do, else freely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_plugin.config import COLDEST_TEMPERATURE
from hybrimoe_plugin.serve.requests import Sampling

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_of(model: Any, given: Mapping[str, Any]) -> Sampling:
    """How a request's tokens are drawn.

    Args:
        model: its `generation_config` fills what is not given. Where that says `do_sample=False`,
            the likeliest token is taken unless a temperature is given.
        given: fields of `Sampling`.
    """
    config = getattr(model, "generation_config", None)
    found: dict[str, Any] = {}
    for name in _NAMES:
        value = getattr(config, name, None)
        if value is not None:
            found[name] = value
    if getattr(config, "do_sample", None) is False:
        found["temperature"] = 0.0
    found.update(given)
    if found.get("temperature", 1.0) < COLDEST_TEMPERATURE:
        found["temperature"] = 0.0
    return Sampling(**found)
