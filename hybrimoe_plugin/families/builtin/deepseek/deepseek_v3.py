"""DeepSeek-V3 and R1, and Kimi-K2: a V2 whose experts are chosen by a sigmoid with a correction."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.builtin.deepseek.deepseek_v2 import (
    SIGMOID,
    deepseek_metadata,
    gating,
    read_deepseek,
)
from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def _holds(facts: Facts) -> bool:
    return gating(facts) == SIGMOID


def _describe(facts: Facts, draft: Draft) -> None:
    read_deepseek(facts, draft)
    norm = facts.flag("expert_weights_norm", False)
    draft.take("norm_topk_prob", norm, "expert_weights_norm")


def _metadata(config: Any) -> dict[str, Any]:
    return deepseek_metadata(config, gating=SIGMOID, dense=config.first_k_dense_replace)


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architectures=("deepseek2",),
    describe=_describe,
    holds=_holds,
    also_called=("kimi_k2",),
    is_one_of_several=True,
    names=GGUFNames(
        tensors={".gate.e_score_correction_bias": "blk.{layer}.exp_probs_b.bias"},
    ),
    metadata=_metadata,
    yarn_mscale=True,
    # vLLM scales the residual stream of this model down in float16, against overflow.
    wide_activations=True,
    rules=PackagedRules(
        engine="DeepSeek-V3.yaml",
        classic="ktransformers/DeepSeek-V3-{device}.yaml",
    ),
    model_class="DeepseekV3ForCausalLM",
    layers=LayerForm.MOE,
    usual_split="deepseek-llm",
)
