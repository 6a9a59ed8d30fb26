"""Granite 3 MoE, with and without a shared expert: factors on embedding, sums and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybrimoe_plugin.families.builtin.llama import LLAMA_NAMES
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

_SHARED = "expert_shared_feed_forward_length"
_FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_NAMES = replace(
    LLAMA_NAMES,
    tensors={".block_sparse_moe.router.weight": "blk.{layer}.ffn_gate_inp.weight"},
    joined={
        ".shared_mlp.input_linear.weight": (
            "blk.{layer}.ffn_gate_shexp.weight",
            "blk.{layer}.ffn_up_shexp.weight",
        )
    },
)


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft, scaled=True)
    read_experts(facts, draft, "num_local_experts")
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    for name, key in _FACTORS.items():
        draft.take(name, facts.number(key))


def _describe_shared(facts: Facts, draft: Draft) -> None:
    _describe(facts, draft)
    draft.take("shared_intermediate_size", facts.integer(_SHARED, least=1))


def _metadata(config: Any) -> dict[str, Any]:
    found = {key: float(getattr(config, name)) for name, key in _FACTORS.items()}
    found["expert_count"] = config.num_local_experts
    found["expert_used_count"] = config.num_experts_per_tok
    return found


def _shared_metadata(config: Any) -> dict[str, Any]:
    return {**_metadata(config), _SHARED: config.shared_intermediate_size}


GRANITE_MOE = Family(
    model_type="granitemoe",
    architectures=("granitemoe",),
    describe=_describe,
    holds=lambda facts: not facts.get(_SHARED, 0),
    names=_NAMES,
    metadata=_metadata,
)

GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    describe=_describe_shared,
    holds=lambda facts: bool(facts.get(_SHARED, 0)),
    metadata=_shared_metadata,
)
