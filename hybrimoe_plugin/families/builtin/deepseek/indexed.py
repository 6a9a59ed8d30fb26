"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3 whose attention takes only what an index chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybrimoe_plugin.families.builtin.deepseek.deepseek_v2 import (
    SIGMOID,
    deepseek_metadata,
    read_deepseek,
)
from hybrimoe_plugin.families.builtin.deepseek.deepseek_v3 import DEEPSEEK_V3
from hybrimoe_plugin.families.family import Family, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft, sparse_layers

_SIZES = {
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
}
_TYPES = "attention.indexer.types"
_NAMES = {True: "full", False: "shared"}
_LONG_CONTEXT = 1 << 20
"""Context of GLM-5.2, some of whose layers share an index; GLM-5 has less, and shares none."""


def _describe(facts: Facts, draft: Draft) -> None:
    read_deepseek(facts, draft, complete=True)
    for name, key in _SIZES.items():
        draft.take(name, facts.integer(key, least=1))
    norm = facts.flag("expert_weights_norm", False)
    draft.take("norm_topk_prob", norm, "expert_weights_norm")
    gating = facts.integer("expert_gating_func", SIGMOID)
    if gating not in (0, SIGMOID):  # 0 is "not set"
        facts.refuse(f"{facts.architecture}.expert_gating_func is {gating}")
    facts.only("attention.layer_norm_epsilon", 1e-6, "the index's norms have 1e-6 in transformers")
    kinds = ["sparse" if sparse else "dense" for sparse in sparse_layers(facts, draft)]
    draft.assumed["mlp_layer_types"] = kinds


def _describe_sharing(facts: Facts, draft: Draft) -> None:
    _describe(facts, draft)
    layers = draft.stated["num_hidden_layers"]
    held = [f"blk.{layer}.indexer.proj.weight" in facts.store.tensors for layer in range(layers)]
    stated = facts.get(_TYPES)
    if stated is None:
        draft.assumed["indexer_types"] = [_NAMES[own] for own in held]
        if all(held) and facts.integer("context_length", 4096) >= _LONG_CONTEXT:
            draft.left_open.append("which layers share an index")
        return
    words = [_word(item) for item in stated] if isinstance(stated, list) else []
    if len(words) < layers or not all(word in _NAMES.values() for word in words):
        raise facts.wrong(_TYPES, f"expected full or shared for {layers} layers", stated)
    draft.take("indexer_types", words[:layers])


def _word(item: Any) -> Any:
    """transformers' word for a layer: converters write it, or whether a layer has its own index."""
    return _NAMES[bool(item)] if item in (0, 1) else item


def _metadata(config: Any) -> dict[str, Any]:
    kinds = config.mlp_layer_types
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    sizes = {key: getattr(config, name) for name, key in _SIZES.items()}
    return {**deepseek_metadata(config, SIGMOID, dense), **sizes}


def _sharing_metadata(config: Any) -> dict[str, Any]:
    own = [kind == "full" for kind in config.indexer_types[: config.num_hidden_layers]]
    return {**_metadata(config), **({} if all(own) else {_TYPES: own})}


DEEPSEEK_V32: Family = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v32",
    architectures=("deepseek32",),
    describe=_describe,
    holds=lambda facts: True,
    also_called=(),
    is_one_of_several=False,
    # A gguf package that knows this architecture names its tensors as those of the other one.
    names=replace(DEEPSEEK_V3.names, mapped_as="glm-dsa"),
    metadata=_metadata,
    rules=PackagedRules(),
    model_class="DeepseekV32ForCausalLM",
    layers=None,
)

GLM_MOE_DSA: Family = replace(
    DEEPSEEK_V32,
    model_type="glm_moe_dsa",
    architectures=("glm-dsa",),
    describe=_describe_sharing,
    names=DEEPSEEK_V3.names,
    # Some converters give every layer the tensors of an index.
    spare_tensors=("indexer.",),
    metadata=_sharing_metadata,
    model_class="GlmMoeDsaForCausalLM",
    usual_split=None,
)
