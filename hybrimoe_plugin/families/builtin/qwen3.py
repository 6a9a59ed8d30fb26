"""Qwen3, dense: a Qwen2 with norms of queries and keys."""

from __future__ import annotations

from hybrimoe_plugin.families.builtin.qwen2 import describe_dense_qwen
from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import ATTENTION, Draft, has_biases


def _describe(facts: Facts, draft: Draft) -> None:
    describe_dense_qwen(facts, draft)
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)


QWEN3 = Family(
    model_type="qwen3",
    architectures=("qwen3",),
    describe=_describe,
    metadata=heads_metadata,
    rules=PackagedRules(flash="lever/qwen3.yaml"),
    layers=LayerForm.DENSE,
    usual_split="qwen2",
)
