"""Which models' KV caches another call can go on with."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from hybrimoe_plugin.compute.attention.kept_entries import can_be_cut
from hybrimoe_plugin.hosts.transformers.prefixes.layers import WHOLE

_MOVING_ROPES = ("dynamic", "longrope")
"""Rotations that depend on the length of the whole sequence, as no kept key can."""

_LINEAR = (
    *("bailing_hybrid", "granitemoehybrid", "kimi_linear", "lfm2_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
)
"""Model types whose linear attention and convolutions take several tokens behind a state.

Others forget the state then, as Jamba's does: each is proved by a test before it is named here.
"""


def new_cache(model: Any) -> Any:
    """An empty KV cache with the kinds of layers that a model's config asks for."""
    return DynamicCache(config=_config(model))


def pass_options(model: Any) -> dict[str, Any]:
    """Arguments of a pass that fills a cache and whose last logits alone are asked for."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    return options


def can_go_on(model: Any) -> bool:
    """Whether several tokens may be computed behind what a model's KV cache holds."""
    config = _config(model)
    if _rope_kinds(config) & set(_MOVING_ROPES):
        return False
    kind = getattr(config, "model_type", None)
    return all(_goes_on(layer, kind) for layer in new_cache(model).layers)


def can_branch(model: Any) -> bool:
    """Whether a sequence can go on behind any token of another one."""
    return can_go_on(model) and all(map(can_be_cut, new_cache(model).layers))


def _goes_on(layer: Any, model_type: str | None) -> bool:
    if type(layer) is LinearAttentionLayer:
        return model_type in _LINEAR
    return can_be_cut(layer) or type(layer) in WHOLE


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _rope_kinds(config: Any) -> set[str]:
    """Kinds of rotation that a config names, for all layers or for each kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return set()
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    return {str(part.get("rope_type")) for part in parts}
