"""MiniMax-M2: norms of all queries and keys at once, rope on part of a head, sigmoid routing."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import Draft, read_common, read_experts, read_heads
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft, partial=True)
    read_experts(facts, draft, "num_local_experts")
    draft.take("intermediate_size", facts.integer("expert_feed_forward_length", least=1))
    facts.integer("feed_forward_length", 0)  # the same
    facts.only("expert_gating_func", 2, "only a sigmoid is supported", unset=0)


def _metadata(config: Any) -> dict[str, Any]:
    return {
        **heads_metadata(config),
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
    }


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architectures=("minimax-m2",),
    describe=_describe,
    names=GGUFNames(tensors={".e_score_correction_bias": "blk.{layer}.exp_probs_b.bias"}),
    metadata=_metadata,
)
