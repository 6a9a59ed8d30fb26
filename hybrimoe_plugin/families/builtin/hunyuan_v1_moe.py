"""Hunyuan-A13B: norms of queries and keys behind the rotary embedding, and one shared expert."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import (
    ATTENTION,
    Draft,
    has_biases,
    read_common,
    read_experts,
    read_heads,
)

_SHARED = "expert_shared_feed_forward_length"


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "num_experts", "moe_topk")
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)
    size = facts.integer("expert_feed_forward_length", least=1)
    draft.take("intermediate_size", size)
    facts.integer("feed_forward_length", 0)  # of no layer
    facts.only(_SHARED, size, f"experts have {size}, and the shared one as many in transformers")
    facts.only("expert_shared_count", 1, "transformers' Hunyuan has one shared expert")


def _metadata(config: Any) -> dict[str, Any]:
    return {
        **heads_metadata(config),
        "expert_count": config.num_experts,
        "expert_used_count": config.moe_topk,
        "expert_feed_forward_length": config.intermediate_size,
        _SHARED: config.intermediate_size,
        "expert_shared_count": 1,
    }


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    architectures=("hunyuan-moe",),
    describe=_describe,
    metadata=_metadata,
)
