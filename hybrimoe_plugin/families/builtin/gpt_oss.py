"""gpt-oss: biases everywhere, attention sinks, and a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import Draft, read_common, read_experts, read_heads
from hybrimoe_plugin.families.rope import FULL, SLIDING
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "num_local_experts")
    draft.take("intermediate_size", facts.integer("expert_feed_forward_length", least=1))
    facts.integer("feed_forward_length", 0)  # of no layer
    draft.take("sliding_window", facts.integer("attention.sliding_window", least=1))
    draft.assumed["layer_types"] = _layer_types(draft.stated["num_hidden_layers"])
    draft.assumed["attention_bias"] = True
    if facts.has("rope.scaling.factor"):
        draft.more_of_rope["truncate"] = False


def _layer_types(layers: int) -> list[str]:
    return [(SLIDING, FULL)[layer % 2] for layer in range(layers)]


def _metadata(config: Any) -> dict[str, Any]:
    if list(config.layer_types) != _layer_types(config.num_hidden_layers):
        raise WeightsError("a GGUF of architecture 'gpt-oss' cannot say other layer_types")
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
    fixed={"swiglu_limit": 7.0},
    metadata=_metadata,
)
