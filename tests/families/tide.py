"""The made-up family of docs/adding-a-family.md, which shows this file."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
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
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "num_experts")
    size = facts.integer("expert_feed_forward_length", least=1)
    draft.take("moe_intermediate_size", size)
    draft.assumed.update(
        intermediate_size=facts.integer("feed_forward_length", size, least=1),
        attention_bias=has_biases(facts, *ATTENTION),
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def metadata(config: Any) -> dict[str, Any]:
    return {
        **heads_metadata(config),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_norm": True,
    }


TIDE = Family(
    model_type="tide_moe",
    architectures=("tide",),
    describe=describe,
    neutral={"expert_weights_norm": (True,)},
    names=GGUFNames(
        mapped_as="qwen3moe",
        tensors={".mlp.gate.weight": "blk.{layer}.router.weight"},
        paired_heads={
            ".self_attn.q_proj.": "num_attention_heads",
            ".self_attn.k_proj.": "num_key_value_heads",
        },
    ),
    metadata=metadata,
    rules=PackagedRules(engine="Qwen3-MoE.yaml"),
    layers=LayerForm.MOE,
    usual_split="qwen2",
)
