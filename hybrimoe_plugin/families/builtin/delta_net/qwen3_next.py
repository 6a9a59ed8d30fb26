"""Qwen3-Next: queries, keys, values and gates of a delta-net in one matrix, head by head."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.families.builtin.delta_net.shared import (
    TENSORS,
    VALUES,
    delta_net_metadata,
    read_delta_net,
)
from hybrimoe_plugin.families.builtin.qwen2_moe import DENSE
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft
from hybrimoe_plugin.weights.gguf_names import GGUFNames


def _by_head(config: Any) -> torch.Tensor:
    """Where the rows of each key head's queries, keys, values and gates are stored.

    The model has them head by head, files have all queries first, then all keys, and so on.
    """
    keys = config.linear_num_key_heads
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim
    start = 0
    parts = []
    for width in (config.linear_key_head_dim, config.linear_key_head_dim, values, values):
        parts.append(torch.arange(start, start + keys * width, device="cpu").view(keys, width))
        start += keys * width
    return torch.cat(parts, dim=1).reshape(-1)


def _joined_rows(config: Any) -> tuple[int, int]:
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return 2 * config.linear_num_key_heads * config.linear_key_head_dim + values, values


def _describe(facts: Facts, draft: Draft) -> None:
    read_delta_net(facts, draft)
    draft.assumed["norm_topk_prob"] = True
    draft.assumed["intermediate_size"] = facts.integer("feed_forward_length", 1)
    draft.assumed["decoder_sparse_step"] = 1


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architectures=("qwen3next",),
    describe=_describe,
    names=GGUFNames(
        tensors={**TENSORS, **DENSE, ".in_proj_ba.weight": "blk.{layer}.ssm_ba.weight"},
        joined={
            ".in_proj_qkvz.weight": (
                "blk.{layer}.attn_qkv.weight",
                "blk.{layer}.attn_gate.weight",
            )
        },
        joined_rows={".in_proj_qkvz.weight": _joined_rows},
        rows={".in_proj_qkvz.weight": _by_head},
        values=VALUES,
    ),
    metadata=delta_net_metadata,
    usual_split="qwen2",
)
