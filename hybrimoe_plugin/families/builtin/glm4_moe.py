"""GLM-4.5 to 4.7: experts chosen by a sigmoid with a correction, rope on part of a head."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.builtin.deepseek.sigmoid_experts import (
    CORRECTION,
    read_sigmoid_experts,
    sigmoid_metadata,
)
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import ATTENTION, Draft, has_biases, read_common, read_heads
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft, partial=True)
    read_sigmoid_experts(facts, draft)
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION[:3])
    draft.assumed["use_qk_norm"] = "blk.0.attn_q_norm.weight" in facts.store.tensors


def _metadata(config: Any) -> dict[str, Any]:
    return {**heads_metadata(config), **sigmoid_metadata(config)}


GLM4_MOE = Family(
    model_type="glm4_moe",
    architectures=("glm4moe",),
    describe=_describe,
    names=GGUFNames(tensors=CORRECTION),
    metadata=_metadata,
)
