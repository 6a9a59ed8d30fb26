"""Qwen3 with routed experts, such as Qwen3-30B-A3B."""

from __future__ import annotations

from hybrimoe_plugin.families.builtin.qwen2_moe import (
    DENSE,
    qwen_moe_metadata,
    read_qwen_moe,
)
from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import ATTENTION, Draft, has_biases
from hybrimoe_plugin.weights.gguf_names import GGUFNames

_WINDOW = "attention.sliding_window"


def _describe(facts: Facts, draft: Draft) -> None:
    read_qwen_moe(facts, draft, normalised=True)
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)
    window = facts.integer(_WINDOW, 0)
    draft.take("use_sliding_window", window > 0, _WINDOW)
    draft.take("sliding_window", window or None, _WINDOW)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architectures=("qwen3moe",),
    describe=_describe,
    names=GGUFNames(tensors=DENSE),
    metadata=qwen_moe_metadata,
    rules=PackagedRules(engine="Qwen3-MoE.yaml", flash="lever/qwen_moe.yaml"),
    layers=LayerForm.MOE,
    usual_split="qwen2",
)
