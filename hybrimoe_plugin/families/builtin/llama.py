"""Llama, and Mistral, which is a Llama with a window."""

from __future__ import annotations

from dataclasses import replace

from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import (
    ATTENTION,
    MLP,
    Draft,
    has_biases,
    read_common,
    read_heads,
)
from hybrimoe_plugin.weights.gguf_names import GGUFNames

LLAMA_NAMES = GGUFNames(
    paired_heads={
        ".self_attn.q_proj.": "num_attention_heads",
        ".self_attn.k_proj.": "num_key_value_heads",
    }
)
"""Files of this architecture have the rows of Q and K in pairs."""

LLAMA_NEUTRAL = {
    # The order of Q's and K's rows that all files of this architecture have.
    "tensor_data_layout": ("Meta AI original pth",),
    # What Mixtral always does.
    "expert_weights_norm": (True,),
}


def _holds(facts: Facts) -> bool:
    return facts.integer("expert_count", 0) == 0


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft)
    read_heads(facts, draft)
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)
    draft.assumed["mlp_bias"] = has_biases(facts, *MLP)


LLAMA = Family(
    model_type="llama",
    architectures=("llama",),
    describe=_describe,
    holds=_holds,
    neutral=LLAMA_NEUTRAL,
    names=LLAMA_NAMES,
    metadata=heads_metadata,
    rules=PackagedRules(flash="lever/llama.yaml"),
    layers=LayerForm.DENSE,
    usual_split="llama-bpe",
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    stored_as="llama",
    rules=PackagedRules(),
    layers=None,  # its window is not part of the form
)
