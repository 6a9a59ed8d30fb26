"""ERNIE 4.5: experts chosen by a softmax with a correction, shared experts, and tied embeddings."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import (
    ATTENTION,
    Draft,
    has_biases,
    read_common,
    read_experts,
    read_heads,
    sparse_layers,
)
from hybrimoe_plugin.weights.gguf_names import GGUFNames

_SHARED = "expert_shared_count"


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "moe_num_experts", "moe_k")
    draft.assumed["use_bias"] = has_biases(facts, *ATTENTION)
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    draft.take("moe_intermediate_size", facts.integer("expert_feed_forward_length", least=1))
    draft.take("moe_num_shared_experts", facts.integer(_SHARED, 0), _SHARED)
    # Converters write one expert's size here; the tensors have that of all.
    facts.integer("expert_shared_feed_forward_length", 0)
    every = facts.integer("interleave_moe_layer_step", 1, least=1)
    dense = facts.integer("leading_dense_block_count", 0)
    draft.take("moe_layer_interval", every, "interleave_moe_layer_step")
    draft.take("moe_layer_start_index", dense, "leading_dense_block_count")
    sparse = sparse_layers(facts, draft)
    last = max((layer for layer, found in enumerate(sparse) if found), default=-1)
    draft.assumed["moe_layer_end_index"] = last


def _metadata(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "expert_feed_forward_length": config.moe_intermediate_size,
        _SHARED: config.moe_num_shared_experts,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "leading_dense_block_count": config.moe_layer_start_index,
    }


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architectures=("ernie4_5-moe",),
    describe=_describe,
    names=GGUFNames(
        tensors={".moe_statics.e_score_correction_bias": "blk.{layer}.exp_probs_b.bias"}
    ),
    fixed={"moe_norm_min": 1e-12},
    metadata=_metadata,
)
