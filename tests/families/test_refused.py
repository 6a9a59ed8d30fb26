"""What of a file cannot be applied, or contradicts a config.json, is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loading import check_same, plain
from ropes import LLAMA3, YARN, YARN_KEYS
from stated import export

from hybrimoe_plugin.errors import WeightsError

ONE = torch.full((64,), 0.5)
REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("mixtral", {"logit_scale": 0.5, "attention.clamp_kqv": 8.0, "attention.causal": False}, ()),
    (
        "mixtral",
        {"rope.scaling.type": "longrope"},
        ("rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    ("mixtral", {"rope.scaling.type": "ntk"}, ()),
    ("mixtral", {"rope.dimension_count": 8}, ()),
    ("mixtral", {"rope.scaling.attn_factor": 1.3}, ()),
    (
        "mixtral",
        {"expert_gating_func": 2, "expert_weights_scale": 2.5, "expert_weights_norm": False},
        (),
    ),
    ("mixtral", {"expert_group_count": 4, "expert_group_used_count": 2}, ()),
    ("mixtral", {"attention.sliding_window_pattern": [True, False]}, ()),
    (
        "mixtral",
        {},
        ("blk.0.attn_q.bias", "blk.1.attn_sinks.weight", "blk.0.attn_q_norm.weight", "unknown"),
    ),
    (
        "mixtral",
        {},
        ("blk.0.exp_probs_b.bias", "blk.0.ffn_gate_inp.bias", "blk.0.ffn_gate_exps.bias"),
    ),
    ("mixtral", {}, ("blk.7.attn_norm.weight",)),
    (
        "llama",
        {"attention.sliding_window": 8, "final_logit_softcapping": 30.0, "embedding_scale": 12.0},
        (),
    ),
    ("llama", {}, ("blk.0.attn_q.bias", "output_norm.bias", "output.bias")),
    ("llama", {"expert_used_count": 2}, ()),
    ("qwen2", {"attention.sliding_window": 8}, ()),
    ("qwen2", {}, ("blk.1.attn_output.bias",)),
    ("qwen2_moe", {"attention.sliding_window": 8, "expert_shared_count": 4}, ()),
    (
        "qwen3",
        {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.1, "rope.scaling.yarn_ext_factor": 0.5},
        (),
    ),
    ("qwen3_moe", {"attention.value_length": 16, "attention.scale": 0.5}, ()),
    (
        "qwen3_moe",
        {"router_logit_softcapping": 5.0, "rope.freq_base_swa": 5.0},
        ("blk.0.attn_qkv.bias",),
    ),
    ("deepseek_v2", {"expert_weights_norm": True, "expert_gating_func": 4}, ()),
    ("deepseek_v2", {}, ("blk.1.exp_probs_b.bias",)),
    ("deepseek_v3", {"attention.indexer.top_k": 8, "attention.temperature_scale": 0.1}, ()),
    (
        "deepseek_v3",
        {},
        ("blk.0.attn_q_a.bias", "blk.1.ffn_gate_shexp.bias", "blk.0.attn_k.weight"),
    ),
]


@pytest.mark.parametrize(("family", "keys", "tensors"), REFUSED)
def test_what_cannot_be_applied_is_named(
    family: str, keys: Any, tensors: Any, tmp_path: Path
) -> None:
    """All of it in one message, keys before tensors."""
    held = dict.fromkeys(tensors, ONE)
    path = export(tiny.model(family), tmp_path / "m.gguf", keys, held)
    with pytest.raises(WeightsError) as error:
        plain(path)
    # Of yarn's keys only an unknown type is refused.
    wrong = [key for key in keys if key not in YARN_KEYS or keys[key] in ("longrope", "ntk")]
    for name in wrong or tensors:
        assert name in str(error.value)


OUT_OF_RANGE: list[tuple[str, str, Any]] = [
    ("mixtral", "expert_used_count", 9),
    ("mixtral", "expert_used_count", 0),
    ("mixtral", "attention.layer_norm_rms_epsilon", 0.0),
    ("mixtral", "attention.layer_norm_rms_epsilon", float("nan")),
    ("mixtral", "attention.head_count_kv", 3),
    ("mixtral", "attention.head_count", 0),
    ("mixtral", "embedding_length", 0),
    ("mixtral", "block_count", 1 << 30),
    ("mixtral", "nextn_predict_layers", 2),
    ("mixtral", "rope.freq_base", float("inf")),
    ("mixtral", "rope.scaling.factor", -2.0),
    ("llama", "attention.key_length", 15),
    ("qwen3_moe", "expert_feed_forward_length", 0),
    ("deepseek_v2", "expert_weights_scale", 0.0),
    ("deepseek_v2", "expert_group_used_count", 5),
    ("deepseek_v3", "expert_group_count", 3),
    ("deepseek_v3", "rope.dimension_count", 64),
]


@pytest.mark.parametrize(("family", "key", "value"), OUT_OF_RANGE)
def test_values_out_of_range_are_named(family: str, key: str, value: Any, tmp_path: Path) -> None:
    path = export(tiny.model(family), tmp_path / "m.gguf", {key: value})
    # An odd number of dimensions cannot have a rotary embedding.
    named = "rope.dimension_count" if key == "attention.key_length" else key
    with pytest.raises(WeightsError) as error:
        plain(path)
    assert named in str(error.value)


CLASHES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {},
        r"5000\.0 .* 10000\.0",
    ),
    ("mixtral", {"rms_norm_eps": 1e-3}, {}, r"rms_norm_eps is 0\.001 there and"),
    (
        "mixtral",
        {},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
        "rope_parameters is .* 'linear'",
    ),
    ("mixtral", {}, {"attention.sliding_window": 8}, "sliding_window is None there and 8 in"),
    ("qwen3_moe", {"norm_topk_prob": False}, {}, "norm_topk_prob is False there and True in"),
    (
        "deepseek_v2",
        {"norm_topk_prob": True},
        {"expert_weights_norm": False},
        "norm_topk_prob is True there and False",
    ),
    (
        "deepseek_v3",
        {"routed_scaling_factor": 1.0, "topk_group": 1},
        {},
        r"1\.0 there and 2\.5 .*topk_group",
    ),
    (
        "deepseek_v2",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        YARN_KEYS,
        "OK",
    ),
    (
        "deepseek_v2",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.0707},
        "mscale_all_dim",
    ),
    ("deepseek_v3", {"rope_parameters": {**YARN, "beta_fast": 1.0}}, YARN_KEYS, "OK"),
    (
        "deepseek_v3",
        {"rope_parameters": {**YARN, "beta_fast": 1.0}},
        {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 32.0},
        "rope_parameters is",
    ),
    ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}, {}, "OK"),
    ("llama", {"max_position_embeddings": 32, "rms_norm_eps": 1.0000001e-6}, {}, "OK"),
]


@pytest.mark.parametrize(("family", "changes", "keys", "message"), CLASHES)
def test_a_directory_and_a_file_must_agree(
    family: str, changes: Any, keys: Any, message: str, tmp_path: Path
) -> None:
    """Both values are named; what only one of them states is taken from there."""
    path = export(tiny.model(family), tmp_path / "m.gguf", keys)
    tiny.config(family, **changes).save_pretrained(tmp_path)
    if message == "OK":
        right = tiny.model(family, **changes)
        check_same(plain(path, tmp_path), right, tiny.tokens(80))
        return
    with pytest.raises(WeightsError, match=message):
        plain(path, tmp_path)
