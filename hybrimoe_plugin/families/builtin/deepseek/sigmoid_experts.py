"""Experts as DeepSeek-V3 brought them in, for families with another attention."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.builtin.deepseek.deepseek_v2 import SIGMOID
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft, read_experts

CORRECTION = {".gate.e_score_correction_bias": "blk.{layer}.exp_probs_b.bias"}


def read_sigmoid_experts(facts: Facts, draft: Draft) -> None:
    """Routed and shared experts, and the dense layers before them.

    Raises:
        WeightsError: a value is missing or out of range.

    Mutates: `draft`.
    """
    read_experts(facts, draft, "n_routed_experts")
    gating = facts.integer("expert_gating_func", SIGMOID)
    if gating not in (0, SIGMOID):  # 0 is "not set"
        facts.refuse(f"{facts.architecture}.expert_gating_func is {gating}")
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    draft.take("moe_intermediate_size", facts.integer("expert_feed_forward_length", least=1))
    draft.take("n_shared_experts", facts.integer("expert_shared_count", 0), "expert_shared_count")
    dense = facts.integer("leading_dense_block_count", 0)
    draft.take("first_k_dense_replace", dense, "leading_dense_block_count")
    scale = facts.number("expert_weights_scale", 1.0)
    draft.take("routed_scaling_factor", scale, "expert_weights_scale")
    norm = facts.flag("expert_weights_norm", False)  # as llama.cpp reads a file without it
    draft.take("norm_topk_prob", norm, "expert_weights_norm")
    draft.take("n_group", facts.integer("expert_group_count", 1) or 1, "expert_group_count")
    chosen = facts.integer("expert_group_used_count", 1) or 1
    draft.take("topk_group", chosen, "expert_group_used_count")


def sigmoid_metadata(config: Any) -> dict[str, Any]:
    """The reverse of `read_sigmoid_experts`."""
    return {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_gating_func": SIGMOID,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
