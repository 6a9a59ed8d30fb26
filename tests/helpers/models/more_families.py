"""Families beyond the first ones, and the switches of their tiny models."""

from __future__ import annotations

from typing import Any

CHANGES: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots1": {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "ernie4_5_moe": {},
    "granitemoe": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoeshared": {"attention_multiplier": 0.1, "logits_scaling": 6.0},
    "gemma4_text": {"final_logit_softcapping": 30.0},
    "gpt_oss": {},
    "hunyuan_v1_moe": {},
    "minimax_m2": {},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen3_next": {},
    "qwen3_5_moe_text": {},
}
"""By model type: what its tiny model has beside the defaults."""
