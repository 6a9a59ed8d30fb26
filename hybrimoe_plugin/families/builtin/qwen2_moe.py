"""Qwen1.5-MoE and Qwen2-57B-A14B: routed experts, and a shared one behind a gate."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family, LayerForm, PackagedRules
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import (
    ATTENTION,
    Draft,
    has_biases,
    read_common,
    read_experts,
    read_heads,
    sparse_layers,
)
from hybrimoe_plugin.weights.gguf_names import GGUFNames

_SHARED = ".ffn_gate_shexp.weight"
DENSE = {
    f".mlp.{part}_proj.weight": f"blk.{{layer}}.ffn_{part}.weight"
    for part in ("gate", "up", "down")
}
"""Tensors of layers without experts, which the `gguf` package's maps for Qwen leave out."""


def read_qwen_moe(facts: Facts, draft: Draft, normalised: bool, partial: bool = False) -> int:
    """What both families of Qwen with experts have; gives the experts' intermediate size.

    Args:
        facts: the file's metadata.
        draft: gets the values.
        normalised: whether a token's expert weights sum to 1 where the file does not say.
        partial: whether the rotary embedding may have only part of a head's dimensions.
    """
    read_common(facts, draft)
    read_heads(facts, draft, partial)
    read_experts(facts, draft, "num_experts")
    # Only the expert size is stored by some converters; it is then the dense size too.
    dense = facts.integer("feed_forward_length", 1)
    expert = facts.integer("expert_feed_forward_length", dense, least=1)
    draft.take("moe_intermediate_size", expert, "expert_feed_forward_length")
    norm = facts.flag("expert_weights_norm", normalised)
    draft.take("norm_topk_prob", norm, "expert_weights_norm")
    draft.assumed.update(
        intermediate_size=facts.integer("feed_forward_length", expert, least=1),
        decoder_sparse_step=1,
        mlp_only_layers=[
            layer for layer, sparse in enumerate(sparse_layers(facts, draft)) if not sparse
        ],
    )
    return expert


def qwen_moe_metadata(config: Any) -> dict[str, Any]:
    """The reverse of `read_qwen_moe`."""
    return {
        **heads_metadata(config),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def _describe(facts: Facts, draft: Draft) -> None:
    expert = read_qwen_moe(facts, draft, normalised=False)
    draft.assumed["qkv_bias"] = has_biases(facts, *ATTENTION[:3])
    tensors = facts.store.tensors
    held = [info.shape[0] for name, info in tensors.items() if name.endswith(_SHARED)]
    usual = held[0] if held else expert
    shared = facts.integer("expert_shared_feed_forward_length", usual, least=1)
    draft.take("shared_expert_intermediate_size", shared, "expert_shared_feed_forward_length")


def _metadata(config: Any) -> dict[str, Any]:
    shared = config.shared_expert_intermediate_size
    return {**qwen_moe_metadata(config), "expert_shared_feed_forward_length": shared}


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architectures=("qwen2moe",),
    describe=_describe,
    names=GGUFNames(tensors=DENSE),
    metadata=_metadata,
    rules=PackagedRules(
        engine="Qwen2-MoE.yaml",
        flash="lever/qwen_moe.yaml",
        classic="ktransformers/Qwen2-57B-A14B-{device}.yaml",
    ),
    model_class="Qwen2MoeForCausalLM",
    layers=LayerForm.MOE,
    usual_split="qwen2",
)
