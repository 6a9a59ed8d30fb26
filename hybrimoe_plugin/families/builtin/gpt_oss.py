"""gpt-oss: biases everywhere, attention sinks, and a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import Draft, read_common, read_experts, read_heads
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "num_local_experts")
    draft.take("intermediate_size", facts.integer("expert_feed_forward_length", least=1))
    facts.integer("feed_forward_length", 0)  # of no layer
    draft.take("sliding_window", facts.integer("attention.sliding_window", least=1))
    layers = draft.stated["num_hidden_layers"]
    kinds = ("sliding_attention", "full_attention")
    draft.assumed["layer_types"] = [kinds[layer % 2] for layer in range(layers)]
    draft.assumed["attention_bias"] = True
    if facts.has("rope.scaling.factor"):
        draft.more_of_rope["truncate"] = False


def _metadata(config: Any) -> dict[str, Any]:
    return {
        **heads_metadata(config),
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
    }


GPT_OSS = Family(
    model_type="gpt_oss",
    architectures=("gpt-oss",),
    describe=_describe,
    names=GGUFNames(
        tensors={".self_attn.sinks": "blk.{layer}.attn_sinks.weight"}, interleaved_experts=True
    ),
    metadata=_metadata,
)
