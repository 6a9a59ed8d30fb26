"""Mixtral: a Llama whose MLP is routed experts."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.builtin.llama import LLAMA_NAMES, LLAMA_NEUTRAL
from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import Draft, read_common, read_experts, read_heads


def _holds(facts: Facts) -> bool:
    return facts.integer("expert_count", 0) > 0


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    size = facts.integer("feed_forward_length", least=1)
    draft.take("intermediate_size", size)
    read_experts(facts, draft, "num_local_experts")
    facts.only(
        "expert_feed_forward_length",
        size,
        f"feed_forward_length is {size}, and it must be the same",
        unset=0,
    )
    window = facts.integer("attention.sliding_window", 0)
    draft.take("sliding_window", window or None, "attention.sliding_window")


def _metadata(config: Any) -> dict[str, Any]:
    return {
        **heads_metadata(config),
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


MIXTRAL = Family(
    model_type="mixtral",
    architectures=("llama",),
    describe=_describe,
    holds=_holds,
    neutral=LLAMA_NEUTRAL,
    names=LLAMA_NAMES,
    metadata=_metadata,
    rules=PackagedRules(
        engine="Mixtral.yaml",
        flash="lever/mixtral.yaml",
        classic="ktransformers/Mixtral-{device}.yaml",
    ),
    model_class="MixtralForCausalLM",
    layers=LayerForm.MOE,
    usual_split="llama-bpe",
)
