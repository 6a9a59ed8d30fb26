"""OLMoE: norms of all queries and keys at once, and routed experts."""

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
)

_NORM, _CLIP = "expert_weights_norm", "attention.clamp_kqv"


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "num_experts")
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    norm = facts.flag(_NORM, False)  # as llama.cpp computes a file without it
    draft.take("norm_topk_prob", norm, _NORM)
    draft.take("clip_qkv", facts.number(_CLIP, 0.0, positive=False) or None, _CLIP)


def _metadata(config: Any) -> dict[str, Any]:
    values = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        _NORM: bool(config.norm_topk_prob),
    }
    if config.clip_qkv is not None:
        values[_CLIP] = float(config.clip_qkv)
    return values


OLMOE = Family(
    model_type="olmoe",
    architectures=("olmoe",),
    describe=_describe,
    metadata=_metadata,
)
