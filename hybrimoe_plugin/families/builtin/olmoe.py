"""OLMoE: norms of all queries and keys at once, and routed experts."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft, read_common, read_experts, read_heads


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "num_experts")
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    draft.assumed["norm_topk_prob"] = False  # as llama.cpp computes it


def _metadata(config: Any) -> dict[str, Any]:
    return {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}


OLMOE = Family(
    model_type="olmoe",
    architectures=("olmoe",),
    describe=_describe,
    metadata=_metadata,
)
