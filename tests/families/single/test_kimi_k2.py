"""Kimi-K2: DeepSeek-V3 in form, under a model type that transformers does not have."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from loading import injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf

FIGURES = {
    # As released, but for sizes: one group, all heads with keys of their own, one dense layer.
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


@pytest.fixture(scope="module")
def right() -> Any:
    return shrunk_model("deepseek_v3", **FIGURES)


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input is at its end: a question would be an error."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def write_config(model: Any, folder: Path) -> None:
    """The config as Kimi-K2's directories have it, beside code that nobody may run."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    values["rope_scaling"] = dict(values.pop("rope_parameters"))
    values["rope_scaling"]["type"] = values["rope_scaling"].pop("rope_type")
    values["rope_theta"] = values["rope_scaling"].pop("rope_theta")
    values |= {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("configuration_deepseek", "modeling_deepseek"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of the directory was run')\n")


def test_a_directory(right: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    right.save_pretrained(tmp_path)
    write_config(right, tmp_path)
    model = injected(None, tmp_path, accelerator="emulated", cache_ratio=0.25)
    check_agreement(model, right)
    assert "auto_map) is not run; transformers' deepseek_v3" in caplog.text
    model.hybrimoe.close()


def test_a_file_with_its_config(right: Any, tmp_path: Path) -> None:
    export_gguf(right, tmp_path / "m.gguf", split_kv_b=True)
    write_config(right, tmp_path)
    check_agreement(plain(tmp_path / "m.gguf", tmp_path), right)


@pytest.mark.parametrize("split", [False, True])
def test_a_file_alone(split: bool, right: Any, tmp_path: Path) -> None:
    export_gguf(right, tmp_path / "m.gguf", split_kv_b=split)
    model = injected(tmp_path / "m.gguf", accelerator="emulated", cache_ratio=0.25)
    check_agreement(model, right)
    model.hybrimoe.close()


def test_a_file_that_leaves_the_ramp_open_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Older converters wrote neither `beta_fast` nor `beta_slow`; the config then decides."""
    plain_rope = {"rope_type": "default", "rope_theta": 50000.0}
    stated = {**FIGURES, "n_routed_experts": 384, "num_experts_per_tok": 8, "hidden_size": 32}
    model = shrunk_model("deepseek_v3", **{**stated, "rope_parameters": plain_rope})
    keys = {"type": "yarn", "factor": 32.0, "original_context_length": 16}
    extra = {f"deepseek2.rope.scaling.{key}": value for key, value in keys.items()}
    extra["deepseek2.rope.scaling.yarn_log_multiplier"] = 0.1
    export_gguf(model, tmp_path / "m.gguf", extra=extra)
    plain(tmp_path / "m.gguf")
    assert "yarn_beta_fast" in caplog.text
    right = shrunk_model("deepseek_v3", **stated)
    write_config(right, tmp_path)
    check_agreement(plain(tmp_path / "m.gguf", tmp_path), right)
