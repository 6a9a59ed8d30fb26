"""Qwen2, dense."""

from __future__ import annotations

from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import Draft, read_common, read_heads


def describe_dense_qwen(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))


QWEN2 = Family(
    model_type="qwen2",
    architectures=("qwen2",),
    describe=describe_dense_qwen,
    metadata=heads_metadata,
    rules=PackagedRules(flash="lever/qwen2.yaml"),
    layers=LayerForm.DENSE,
    usual_split="qwen2",
)
