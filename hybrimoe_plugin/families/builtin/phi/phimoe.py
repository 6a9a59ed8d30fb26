"""Phi-3.5-MoE: biases, norms that subtract the mean, and a rotary embedding by the text's length.

transformers' forward is followed. llama.cpp takes the norms for root mean squares and chooses
experts by a plain softmax, so its answers are others.
"""

from __future__ import annotations

import math
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.gguf_rope import FACTORS, LONG_FACTORS
from hybrimoe_plugin.families.reading import (
    ATTENTION,
    Draft,
    has_biases,
    read_common,
    read_experts,
    read_heads,
)
from hybrimoe_plugin.weights.gguf_names import GGUFNames

_RELEASED_SCALE = 1.243163121016122
"""`short_mscale` and `long_mscale` of Phi-3.5-MoE, which converters leave out."""
_SCALE = "rope.scaling.attn_factor"
_WINDOW = "attention.sliding_window"
_JITTER = 0.01


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    read_experts(facts, draft, "num_local_experts")
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    eps = draft.stated["rms_norm_eps"]
    facts.only("attention.layer_norm_epsilon", eps, "norms have attention.layer_norm_rms_epsilon")
    draft.take("sliding_window", facts.integer(_WINDOW, 0) or None, _WINDOW)
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)
    draft.assumed["lm_head_bias"] = "output.bias" in facts.store.tensors
    draft.assumed["router_jitter_noise"] = _JITTER
    draft.rope_by_context = True
    if FACTORS in facts.store.tensors:
        facts.refuse(f"tensor {FACTORS}")  # of no released model: nobody knows its scale
    if LONG_FACTORS in facts.store.tensors:
        _read_scale(facts, draft)


def _read_scale(facts: Facts, draft: Draft) -> None:
    """What cosines and sines are multiplied by."""
    context = facts.integer("context_length", 4096, least=1)
    original = facts.integer("rope.scaling.original_context_length", least=2)
    scale = facts.number(_SCALE, 1.0)
    if math.isclose(scale, _computed_scale(context, original), rel_tol=1e-5):
        scale = _RELEASED_SCALE
        draft.notices.append(
            "it does not state short_mscale and long_mscale of its rotary embedding: they are "
            f"taken to be {scale:.6g}, as in Phi-3.5-MoE; give its config.json with --model_path "
            "if this is another model"
        )
    draft.more_of_rope.update(short_mscale=scale, long_mscale=scale)


def _computed_scale(context: int, original: int) -> float:
    """What converters write, whatever the model's own scales are."""
    if context <= original:
        return 1.0
    return math.sqrt(1 + math.log(context / original) / math.log(original))


def _metadata(config: Any) -> dict[str, Any]:
    values = {
        **heads_metadata(config),
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return values
    scale = float(rope["short_mscale"])
    if rope["rope_type"] != "longrope" or scale != rope["long_mscale"]:
        raise WeightsError("a GGUF of architecture 'phimoe' cannot say this rotary embedding")
    original = rope["original_max_position_embeddings"]
    if scale == _RELEASED_SCALE:
        scale = _computed_scale(config.max_position_embeddings, original)
    return {**values, _SCALE: scale, "rope.scaling.original_context_length": original}


PHIMOE = Family(
    model_type="phimoe",
    architectures=("phimoe",),
    describe=_describe,
    # Older gguf packages do not know the router by this name.
    names=GGUFNames(tensors={".mlp.router.weight": "blk.{layer}.ffn_gate_inp.weight"}),
    fixed={"router_jitter_noise": _JITTER},
    metadata=_metadata,
)
