"""GLM-4.7-Flash: DeepSeek-V3 in form, in files of DeepSeek's architecture that do not say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybrimoe_plugin.families.builtin.deepseek.deepseek_v2 import (
    SIGMOID,
    deepseek_metadata,
    gating,
)
from hybrimoe_plugin.families.builtin.deepseek.deepseek_v3 import DEEPSEEK_V3
from hybrimoe_plugin.families.family import PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft, sparse_layers

_CORRECTION = "exp_probs_b.bias"


def _holds(facts: Facts) -> bool:
    """Whether experts are corrected, as by a sigmoid, and the file states no gating function."""
    corrected = any(name.endswith(_CORRECTION) for name in facts.store.tensors)
    return corrected and gating(facts) == 0


def _describe(facts: Facts, draft: Draft) -> None:
    DEEPSEEK_V3.describe(facts, draft)
    kinds = ["sparse" if sparse else "dense" for sparse in sparse_layers(facts, draft)]
    draft.assumed["mlp_layer_types"] = kinds
    for name in ("first_k_dense_replace", "norm_topk_prob"):
        draft.stated.pop(name, None)


def _metadata(config: Any) -> dict[str, Any]:
    kinds = config.mlp_layer_types
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    values = deepseek_metadata(config, SIGMOID, dense)
    del values["expert_gating_func"]
    return values


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    describe=_describe,
    metadata=_metadata,
    model_type="glm4_moe_lite",
    also_called=(),
    holds=_holds,
    rules=PackagedRules(),
    model_class="Glm4MoeLiteForCausalLM",
    layers=None,
    usual_split=None,
)
