"""Every tensor and key of a file is applied, as the plain transformers forward shows, or refused by
its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import kt_kernel
from stated import architecture_of, export, factors, logits

from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers import gguf_export, load_plain_model

THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", **THETA, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    **THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", **THETA, "factor": 3.0}

ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}),
    "linear, old key": (LINEAR, {"rope.scale_linear": 3.0}),
    "yarn": ({**YARN, "beta_fast": 32.0, "beta_slow": 1.0}, YARN_KEYS),
    "yarn, betas": (
        {**YARN, "beta_fast": 8.0, "beta_slow": 3.0},
        {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 3.0},
    ),
    "yarn, attention factor": (
        {**YARN, "attention_factor": 1.4},
        {**YARN_KEYS, "rope.scaling.yarn_attn_factor": 1.4},
    ),
    "yarn, mscale": (
        {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.0707},
    ),
    "llama3": ({**LLAMA3, "original_max_position_embeddings": 8192}, {}),
    "other factors": ({**LLAMA3, "original_max_position_embeddings": 64}, {}),
}
MULTI_HEAD = ("mixtral", "qwen2_moe", "qwen3_moe", "llama", "qwen2", "qwen3")
LATENT = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
APPLIED = [
    *((family, name) for family in MULTI_HEAD for name in ("yarn, betas", "other factors")),
    *((family, name) for family in LATENT for name in ("yarn, mscale", "yarn, betas")),
    *(
        ("mixtral", name)
        for name in ("linear", "linear, old key", "yarn", "yarn, attention factor", "llama3")
    ),
    ("deepseek_v3", "linear"),
    ("llama", "llama3"),
    ("qwen3", "linear, old key"),
]


def with_rope(family: str, parameters: dict[str, Any]) -> Any:
    # transformers needs to be told the heads' size for Mixtral with yarn.
    size = {"head_dim": 16} if family == "mixtral" else {}
    return tiny.model(family, rope_parameters=parameters, **size)


def check_equal(path: Path, right: Any, other: Any, **settings: Any) -> None:
    """The file's model says what `right` says, and `other`, which lacks the feature, does not."""
    prompt, steps = tiny.tokens(80), tiny.tokens(2, seed=1)
    wanted = logits(right, prompt, steps)
    assert (logits(other, prompt, steps) - wanted).abs().max() > 1e-2
    if settings:
        model, _ = load_model(
            None, path, dtype="float32", cpu_backend="torch", progress=False, **settings
        )
    else:
        model, _ = load_plain_model(None, path, dtype="float32", progress=False)
    torch.testing.assert_close(logits(model, prompt, steps), wanted, rtol=1e-4, atol=1e-4)
    if settings:
        model.hybrimoe.close()


@pytest.mark.parametrize(("family", "name"), APPLIED)
def test_rotary_embeddings_are_applied(family: str, name: str, tmp_path: Path) -> None:
    parameters, keys = ROPES[name]
    right = with_rope(family, parameters)
    path = export(tiny.model(family), tmp_path / "m.gguf", keys, factors(right))
    check_equal(path, right, tiny.model(family))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_rotary_embeddings_reach_the_lean_operators(family: str, tmp_path: Path) -> None:
    kt_kernel()
    parameters, keys = ROPES["other factors" if family == "mixtral" else "yarn, mscale"]
    right = with_rope(family, parameters)
    path = export(tiny.model(family), tmp_path / "m.gguf", keys, factors(right))
    check_equal(path, right, tiny.model(family), linears="quantised")


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
def test_other_features_are_applied(family: str, changes: Any, keys: Any, tmp_path: Path) -> None:
    right = tiny.model(family, **changes)
    check_equal(export(right, tmp_path / "m.gguf", keys), right, tiny.model(family))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3_moe", {"attention_bias": True}), ("mixtral", {"sliding_window": 8})],
)
def test_features_reach_the_lean_operators(family: str, changes: Any, tmp_path: Path) -> None:
    kt_kernel()
    right = tiny.model(family, **changes)
    keys = {"attention.sliding_window": 8} if "sliding_window" in changes else {}
    check_equal(
        export(right, tmp_path / "m.gguf", keys), right, tiny.model(family), linears="quantised"
    )


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
    check_equal(export(right, tmp_path / "m.gguf"), right, tiny.model(family))


def test_factors_by_context_are_exported_and_refused(tmp_path: Path) -> None:
    rope = {**THETA, "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64}
    lists = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    path = export(with_rope("mixtral", {**rope, **lists}), tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match=r"rope\.scaling\.type is 'longrope'"):
        load_plain_model(None, path, dtype="float32", progress=False)


def test_a_loaded_model_is_exported_with_its_factors(tmp_path: Path) -> None:
    right = with_rope("llama", ROPES["other factors"][0])
    loaded, _ = load_plain_model(
        None, export(right, tmp_path / "m.gguf"), dtype="float32", progress=False
    )
    check_equal(export(loaded, tmp_path / "again.gguf"), right, tiny.model("llama"))


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
    path = export(tiny.model(family), tmp_path / "m.gguf", keys, dict.fromkeys(tensors, ONE))
    with pytest.raises(WeightsError) as error:
        load_plain_model(None, path, dtype="float32", progress=False)
    wanted = [
        key for key in keys if key not in YARN_KEYS or keys[key] in ("longrope", "ntk")
    ] or tensors
    assert [name for name in wanted if name not in str(error.value)] == []


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


def test_what_changes_nothing_is_accepted(tmp_path: Path) -> None:
    """Neutral values, sections of other programs, tensors that say again what is known, layers for
    look-ahead.
    """
    right = tiny.model("mixtral")
    frequencies = 10000.0 ** -(torch.arange(8) / 8)
    tensors = {
        "rope_freqs.weight": torch.ones(8),
        "blk.0.attn_rot_embd.weight": frequencies,
        "blk.2.attn_norm.weight": ONE,
        "blk.2.nextn.eh_proj.weight": torch.zeros(64, 128),
    }
    keys = {**NEUTRAL, "block_count": 3, "nextn_predict_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        plain = gguf_export.metadata
        other = {"quantize.imatrix.file": "m.dat", "mradermacher.quantized_by": "somebody"}
        patch.setattr(gguf_export, "metadata", lambda *args: {**plain(*args), **other})
        path = export(right, tmp_path / "m.gguf", keys, tensors)
    model, _ = load_plain_model(None, path, dtype="float32", progress=False)
    torch.testing.assert_close(logits(model, tiny.tokens(20)), logits(right, tiny.tokens(20)))


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
    wanted = (
        "rope.dimension_count" if key == "attention.key_length" else key
    )  # an odd number cannot be turned
    with pytest.raises(WeightsError, match=wanted.replace(".", r"\.")):
        load_plain_model(None, path, dtype="float32", progress=False)


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
    if message != "OK":
        with pytest.raises(WeightsError, match=message):
            load_plain_model(tmp_path, path, dtype="float32", progress=False)
        return
    model, _ = load_plain_model(tmp_path, path, dtype="float32", progress=False)
    torch.testing.assert_close(
        logits(model, tiny.tokens(80)), logits(tiny.model(family, **changes), tiny.tokens(80))
    )


def test_a_head_of_its_own_is_used_where_the_directory_ties_it(tmp_path: Path) -> None:
    right = tiny.model("qwen3")
    path = export(right, tmp_path / "m.gguf")
    tiny.config("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path)
    model, _ = load_plain_model(tmp_path, path, dtype="float32", progress=False)
    torch.testing.assert_close(logits(model, tiny.tokens(9)), logits(right, tiny.tokens(9)))


def test_both_forms_of_a_latent_projection_may_be_there(tmp_path: Path) -> None:
    right = tiny.model("deepseek_v3")
    split = gguf_export.tensors(right, family_of("deepseek_v3"), split_kv_b=True)
    again = {
        name: value for name, value in split.items() if "attn_k_b" in name or "attn_v_b" in name
    }
    model, _ = load_plain_model(
        None, export(right, tmp_path / "m.gguf", None, again), dtype="float32", progress=False
    )
    torch.testing.assert_close(logits(model, tiny.tokens(9)), logits(right, tiny.tokens(9)))


def test_a_latent_model_as_current_converters_write_it(tmp_path: Path) -> None:
    """Multi-query form: one key head, lengths of the absorbed form, kv_b in two parts."""
    right = with_rope("deepseek_v3", ROPES["yarn, mscale"][0])
    keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "attention.key_length_mla": 32,
        "attention.value_length_mla": 16,
        **ROPES["yarn, mscale"][1],
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    arch = architecture_of(right)
    path = tmp_path / "m.gguf"
    gguf_export.export_gguf(
        right, path, split_kv_b=True, extra={f"{arch}.{key}": value for key, value in keys.items()}
    )
    check_equal(path, right, tiny.model("deepseek_v3"))
    right.config.save_pretrained(tmp_path)
    load_plain_model(tmp_path, path, dtype="float32", progress=False)


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
    right, plain = tiny.model(family, **changes), gguf_export.metadata
    monkeypatch.setattr(
        gguf_export,
        "metadata",
        lambda *args: {key: v for key, v in plain(*args).items() if "_group_" not in key},
    )
    path = export(right, tmp_path / "m.gguf")
    check_equal(path, right, tiny.model(family, **{**changes, "n_group": 1, "topk_group": 1}))
    assert "does not state how its experts are grouped" in caplog.text
    caplog.clear()
    right.config.save_pretrained(tmp_path)
    load_plain_model(tmp_path, path, dtype="float32", progress=False)
    assert "grouped" not in caplog.text


UNSET = {
    "mixtral": {"attention.scale": 0.0, "expert_feed_forward_length": 0},
    "deepseek_v2": {"expert_shared_feed_forward_length": 256},
}


@pytest.mark.parametrize("family", UNSET)
def test_values_that_stand_for_none_or_say_again_what_is_known(family: str, tmp_path: Path) -> None:
    right = tiny.model(family)
    model, _ = load_plain_model(
        None, export(right, tmp_path / "m.gguf", UNSET[family]), dtype="float32", progress=False
    )
    torch.testing.assert_close(logits(model, tiny.tokens(9)), logits(right, tiny.tokens(9)))


def test_a_key_of_another_family_changes_nothing(tmp_path: Path) -> None:
    """transformers' DeepSeek-V2 does not look at V3's `rope_interleave`, so neither do the
    operators.
    """
    path = tiny.write(tmp_path, "deepseek_v2")
    tiny.config("deepseek_v2", rope_interleave=False).save_pretrained(tmp_path)
    plain, _ = load_plain_model(tmp_path, path, dtype="float32", progress=False)
    model, _ = load_model(
        tmp_path, path, dtype="float32", cpu_backend="torch", accelerator="none", progress=False
    )
    torch.testing.assert_close(logits(model, tiny.tokens(9)), logits(plain, tiny.tokens(9)))
