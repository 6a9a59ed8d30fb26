"""What Qwen3-Next and Qwen3.5 share: gated delta-nets in most layers, and how files change values.

llama.cpp's converter adds 1 to the norms that transformers adds 1 to when it computes, stores a
decay as its negative exponential, and takes the middle dimension out of convolutions.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.families.builtin.qwen2_moe import read_qwen_moe
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.gguf_metadata import heads_metadata
from hybrimoe_plugin.families.reading import ATTENTION, Draft, has_biases
from hybrimoe_plugin.weights.gguf_names import Change

_SHARED = "expert_shared_feed_forward_length"


_SAME = Change(lambda stored, _: stored, lambda value, _: value)
_ONE_MORE = Change(lambda stored, _: stored - 1, lambda value, _: value + 1)
_DECAY = Change(lambda stored, _: (-stored).log(), lambda value, _: -value.exp())
_NO_MIDDLE = Change(lambda stored, _: stored[:, None], lambda value, _: value[:, 0])
VALUES = {
    ".linear_attn.norm.weight": _SAME,  # before the other norms
    "norm.weight": _ONE_MORE,
    ".A_log": _DECAY,
    ".conv1d.weight": _NO_MIDDLE,
}
TENSORS = {
    ".linear_attn.A_log": "blk.{layer}.ssm_a",
    ".linear_attn.dt_bias": "blk.{layer}.ssm_dt.bias",
}


def read_delta_net(facts: Facts, draft: Draft) -> None:
    """Both families' metadata.

    Raises:
        WeightsError: a value is missing or out of range.

    Mutates: `draft`.
    """
    read_qwen_moe(facts, draft, normalised=True, partial=True)
    for name in ("intermediate_size", "decoder_sparse_step", "norm_topk_prob"):
        draft.assumed.pop(name, None)
    draft.assumed["attention_bias"] = has_biases(facts, *ATTENTION)
    draft.take("shared_expert_intermediate_size", facts.integer(_SHARED, least=1))
    draft.take("linear_conv_kernel_dim", facts.integer("ssm.conv_kernel", least=1))
    draft.take("linear_key_head_dim", facts.integer("ssm.state_size", least=1))
    draft.take("linear_num_key_heads", facts.integer("ssm.group_count", least=1))
    heads = facts.integer("ssm.time_step_rank", least=1)
    inner = facts.integer("ssm.inner_size", least=1)
    if inner % heads:
        raise facts.wrong("ssm.inner_size", f"it must be a multiple of {heads} heads", inner)
    draft.take("linear_num_value_heads", heads)
    draft.take("linear_value_head_dim", inner // heads)
    every = facts.integer("full_attention_interval", 4, least=1)
    layers = draft.stated["num_hidden_layers"]
    usual = [bool((layer + 1) % every) for layer in range(layers)]
    recurrent = facts.get("attention.recurrent_layers", usual)
    if not isinstance(recurrent, list) or len(recurrent) < layers:
        raise facts.wrong(
            "attention.recurrent_layers", f"expected true or false for {layers} layers", recurrent
        )
    kinds = ("full_attention", "linear_attention")
    draft.assumed["layer_types"] = [kinds[bool(recurrent[layer])] for layer in range(layers)]


def delta_net_metadata(config: Any) -> dict[str, Any]:
    """The reverse of `read_delta_net`."""
    heads = config.linear_num_value_heads
    return {
        **heads_metadata(config),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        _SHARED: config.shared_expert_intermediate_size,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * config.linear_value_head_dim,
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
    }


def tiled(config: Any, width: int, before: int = 0) -> torch.Tensor:
    """Where rows of value heads are stored: files tile key heads, the model groups by them.

        the model      key 0: value 0, value 1 | key 1: value 2, value 3
        files          value 0, value 2 | value 1, value 3

    Args:
        width: rows of one value head.
        before: rows that come first, and in order.
    """
    keys = config.linear_num_key_heads
    values = config.linear_num_value_heads // keys
    stored = torch.arange(keys * values * width, device="cpu").view(values, keys, width)
    order = stored.transpose(0, 1).reshape(-1) + before
    return torch.cat((torch.arange(before, device="cpu"), order))
