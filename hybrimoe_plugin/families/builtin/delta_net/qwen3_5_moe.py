"""Qwen3.5 and 3.6 with routed experts: value heads of delta-nets are stored in another order."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.families.builtin.delta_net.shared import (
    TENSORS,
    VALUES,
    delta_net_metadata,
    read_delta_net,
    tiled,
)
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft
from hybrimoe_plugin.weights.gguf_names import Change, GGUFNames

_SECTIONS = [11, 11, 10]


def _heads(config: Any) -> torch.Tensor:
    return tiled(config, 1)


def _values(config: Any) -> torch.Tensor:
    return tiled(config, config.linear_value_head_dim)


def _behind_keys(config: Any) -> torch.Tensor:
    """Queries and keys, which are in order, and then values."""
    before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return tiled(config, config.linear_value_head_dim, before)


_COLUMNS = Change(
    lambda stored, config: stored[:, _values(config)],
    lambda value, config: value[:, _values(config).argsort()],
)


def _describe(facts: Facts, draft: Draft) -> None:
    read_delta_net(facts, draft)
    draft.assumed.pop("mlp_only_layers")  # its layers all have experts
    facts.integer("feed_forward_length", 0)  # of no layer
    sections = facts.get("rope.dimension_sections", _SECTIONS)
    # Of pictures' positions: text has the same one in all sections.
    if not isinstance(sections, list) or not all(type(item) is int for item in sections):
        raise facts.wrong("rope.dimension_sections", "expected whole numbers", sections)


QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    architectures=("qwen35moe",),
    describe=_describe,
    names=GGUFNames(
        tensors=TENSORS,
        rows={
            ".in_proj_qkv.weight": _behind_keys,
            ".conv1d.weight": _behind_keys,
            ".in_proj_z.weight": _values,
            ".in_proj_a.weight": _heads,
            ".in_proj_b.weight": _heads,
            ".A_log": _heads,
            ".dt_bias": _heads,
        },
        values={**VALUES, ".linear_attn.out_proj.weight": _COLUMNS},
    ),
    metadata=delta_net_metadata,
    usual_split="qwen35",
)
