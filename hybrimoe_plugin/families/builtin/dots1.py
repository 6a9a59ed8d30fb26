"""dots.llm1: a Qwen3 whose experts are chosen by a sigmoid with a correction."""

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
from hybrimoe_plugin.families.reading import (
    ATTENTION,
    Draft,
    has_biases,
    read_common,
    read_heads,
)
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_sigmoid_experts(facts, draft)
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)


def _metadata(config: Any) -> dict[str, Any]:
    return {**heads_metadata(config), **sigmoid_metadata(config)}


DOTS1 = Family(
    model_type="dots1",
    architectures=("dots1",),
    describe=_describe,
    names=GGUFNames(tensors=CORRECTION),
    metadata=_metadata,
)
