"""Refuses what a GGUF file states and kTransformers would ignore.

It takes everything but the weights from config.json.
"""

from __future__ import annotations

import re
from typing import Any

from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_rope import FACTORS
from hybrimoe_plugin.families.registry import families_stored_as
from hybrimoe_plugin.weights.gguf_store import GGUFStore

_IN_CONFIG = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "expert_count",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_mla",
    "attention.kv_lora_rank",
    "attention.layer_norm_rms_epsilon",
    "attention.q_lora_rank",
    "attention.value_length",
    "attention.value_length_mla",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)
"""Keys whose values the models of this host have from config.json."""
_BIASES = {"qwen2moe": ("attn_q", "attn_k", "attn_v"), "deepseek2": ("exp_probs_b",)}
"""Biases that models of these architectures have here."""
_NAME = re.compile(r"^(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+?)(?:\.\d+)?\.(?P<kind>weight|bias)$")


def check_complete(store: GGUFStore) -> None:
    """Look at keys and names of tensors, before anything is read.

    Raises:
        WeightsError: naming what models of this host have no place for.
    """
    facts = Facts(store)
    for key in _IN_CONFIG:
        facts.get(key)
    known = _known_parts(store)
    blocks, ahead = facts.integer("block_count", 0), facts.integer("nextn_predict_layers", 0)
    layers = blocks - ahead if ahead else None
    for name in store.tensors:
        if not _has_place(name, store, known, layers):
            facts.refuse(f"tensor {name}")
    neutral: dict[str, tuple[Any, ...]] = {}
    for family in families_stored_as(store.architecture):
        neutral |= family.neutral
    facts.check_all_read(neutral)


def _known_parts(store: GGUFStore) -> set[str]:
    """Names of tensors of the architecture, without layer and kind.

    Raises:
        WeightsError: the `gguf` package knows no such architecture.
    """
    architectures = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    if store.architecture not in architectures:
        raise WeightsError(f"{store.paths[0]}: unknown GGUF architecture {store.architecture!r}")
    kinds = MODEL_TENSORS[architectures[store.architecture]]
    names = {TENSOR_NAMES[kind].removeprefix("blk.{bid}.") for kind in kinds}
    return names - {"rope_freqs"}


def _has_place(name: str, store: GGUFStore, known: set[str], layers: int | None) -> bool:
    """Whether a model has a place for a tensor.

    Layers from `layers` on predict further tokens, and are not used.
    """
    if name == FACTORS:
        return bool((store.dequantized(name) == 1).all())
    found = _NAME.match(name)
    if found is None:
        return False
    if layers is not None and found["layer"] and int(found["layer"]) >= layers:
        return True
    part = found["part"]
    if found["kind"] == "bias":
        return part in _BIASES.get(store.architecture, ())
    return part in known
