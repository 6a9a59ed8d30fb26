"""What a file states is applied, as the plain transformers forward shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loading import check_applied, check_same, injected, plain
from needs import kt_kernel
from ropes import LLAMA3, YARN
from stated import export

from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers import gguf_export

PROMPT = tiny.tokens(9)

FEATURES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"attention_bias": True}, {}),
    ("llama", {"mlp_bias": True}, {}),
    ("qwen3", {"attention_bias": True}, {}),
    ("qwen3_moe", {"attention_bias": True}, {}),
    ("deepseek_v2", {"attention_bias": True}, {}),
    ("deepseek_v2_lite", {"attention_bias": True}, {}),
    ("deepseek_v3", {"attention_bias": True}, {}),
    ("qwen2_moe", {"qkv_bias": False}, {}),
    ("mixtral", {"sliding_window": 8}, {"attention.sliding_window": 8}),
    (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 8},
        {"attention.sliding_window": 8},
    ),
    ("qwen3_moe", {"norm_topk_prob": False}, {"expert_weights_norm": False}),
    ("deepseek_v3", {"norm_topk_prob": False}, {"expert_weights_norm": False}),
    ("deepseek_v2", {"routed_scaling_factor": 0.5}, {"expert_weights_scale": 0.5}),
]


@pytest.mark.parametrize(("family", "changes", "keys"), FEATURES)
def test_features_are_applied(family: str, changes: Any, keys: Any, tmp_path: Path) -> None:
    right = tiny.model(family, **changes)
    path = export(right, tmp_path / "m.gguf", keys)
    check_applied(path, right, tiny.model(family))


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        ("qwen3_moe", {"attention_bias": True}, {}),
        ("mixtral", {"sliding_window": 8}, {"attention.sliding_window": 8}),
    ],
)
def test_features_reach_the_fused_operators(
    family: str, changes: Any, keys: Any, tmp_path: Path
) -> None:
    kt_kernel()
    right = tiny.model(family, **changes)
    path = export(right, tmp_path / "m.gguf", keys)
    check_applied(path, right, tiny.model(family), dense="quantised")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"rope_parameters": {**YARN, "beta_fast": 8.0}, "head_dim": 16}),
        ("qwen3_moe", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
        ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707}}),
        ("mixtral", {"sliding_window": 8}),
    ],
)
def test_exported_files_say_all_of_it(family: str, changes: Any, tmp_path: Path) -> None:
    right = tiny.model(family, **changes)
    path = export(right, tmp_path / "m.gguf")
    check_applied(path, right, tiny.model(family))


NEUTRAL = {
    "attention.causal": True,
    "attention.layer_norm_epsilon": 1e-5,
    "attn_logit_softcapping": 0.0,
    "expert_gating_func": 1,
    "expert_group_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "pooling_type": 3,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.factor": 4.0,
    "rope.scaling.finetuned": False,
    "rope.scaling.type": "none",
    "tensor_data_layout": "Meta AI original pth",
}


def test_what_changes_nothing_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neutral values, sections of other programs, tensors that say again what is known, layers for
    look-ahead.
    """
    right = tiny.model("mixtral")
    frequencies = 10000.0 ** -(torch.arange(8) / 8)
    tensors = {
        "rope_freqs.weight": torch.ones(8),
        "blk.0.attn_rot_embd.weight": frequencies,
        "blk.2.attn_norm.weight": torch.full((64,), 0.5),
        "blk.2.nextn.eh_proj.weight": torch.zeros(64, 128),
    }
    keys = {**NEUTRAL, "block_count": 3, "nextn_predict_layers": 1}
    others = {"quantize.imatrix.file": "m.dat", "mradermacher.quantized_by": "somebody"}
    metadata = gguf_export.metadata
    monkeypatch.setattr(gguf_export, "metadata", lambda *args: {**metadata(*args), **others})
    path = export(right, tmp_path / "m.gguf", keys, tensors)
    check_same(plain(path), right, tiny.tokens(20))


def test_a_head_of_its_own_is_used_where_the_directory_ties_it(tmp_path: Path) -> None:
    right = tiny.model("qwen3")
    path = export(right, tmp_path / "m.gguf")
    tiny.config("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path)
    check_same(plain(path, tmp_path), right, PROMPT)


def test_both_forms_of_a_latent_projection_may_be_there(tmp_path: Path) -> None:
    right = tiny.model("deepseek_v3")
    tensors = gguf_export.tensors(right, family_of("deepseek_v3"), split_kv_b=True)
    halves = [name for name in tensors if "attn_k_b" in name or "attn_v_b" in name]
    again = {name: tensors[name] for name in halves}
    path = export(right, tmp_path / "m.gguf", None, again)
    check_same(plain(path), right, PROMPT)


OLD_FILES = {
    "deepseek_v2": {
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
    },
    "deepseek_v3": {
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
    },
}


@pytest.mark.parametrize("family", OLD_FILES)
def test_groups_that_an_old_file_does_not_state(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of DeepSeek's large models from before the keys: grouped as released, with a notice."""
    changes = {**OLD_FILES[family], "moe_intermediate_size": 32}
    changes |= {"topk_method": "group_limited_greedy"} if family == "deepseek_v2" else {}
    right = tiny.model(family, **changes)
    metadata = gguf_export.metadata

    def without_groups(*args: Any) -> dict[str, Any]:
        return {key: value for key, value in metadata(*args).items() if "_group_" not in key}

    monkeypatch.setattr(gguf_export, "metadata", without_groups)
    path = export(right, tmp_path / "m.gguf")
    ungrouped = tiny.model(family, **{**changes, "n_group": 1, "topk_group": 1})
    check_applied(path, right, ungrouped)
    assert "does not state how its experts are grouped" in caplog.text
    caplog.clear()
    right.config.save_pretrained(tmp_path)
    plain(path, tmp_path)
    assert "grouped" not in caplog.text


UNSET = {
    "mixtral": {"attention.scale": 0.0, "expert_feed_forward_length": 0},
    "deepseek_v2": {"expert_shared_feed_forward_length": 256},
}


@pytest.mark.parametrize("family", UNSET)
def test_values_that_stand_for_none_or_say_again_what_is_known(family: str, tmp_path: Path) -> None:
    right = tiny.model(family)
    path = export(right, tmp_path / "m.gguf", UNSET[family])
    check_same(plain(path), right, PROMPT)


def test_a_key_of_another_family_changes_nothing(tmp_path: Path) -> None:
    """transformers' DeepSeek-V2 does not look at V3's `rope_interleave`, so neither do the
    operators.
    """
    path = tiny.write(tmp_path, "deepseek_v2")
    tiny.config("deepseek_v2", rope_interleave=False).save_pretrained(tmp_path)
    model = injected(path, tmp_path, accelerator="none")
    check_same(model, plain(path, tmp_path), PROMPT)
    model.hybrimoe.close()
