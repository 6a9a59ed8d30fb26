"""Rotary embeddings of a file are applied, as the plain transformers forward shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from loading import check_applied, plain
from needs import kt_kernel
from ropes import ROPES, THETA, with_rope
from stated import architecture_of, export, factors

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf

MULTI_HEAD = ("mixtral", "qwen2_moe", "qwen3_moe", "llama", "qwen2", "qwen3")
LATENT = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
APPLIED = [
    *((family, name) for family in MULTI_HEAD for name in ("yarn, betas", "other factors")),
    *((family, name) for family in LATENT for name in ("yarn, mscale", "yarn, betas")),
    ("mixtral", "linear"),
    ("mixtral", "linear, old key"),
    ("mixtral", "yarn"),
    ("mixtral", "yarn, attention factor"),
    ("mixtral", "llama3"),
    ("deepseek_v3", "linear"),
    ("llama", "llama3"),
    ("qwen3", "linear, old key"),
]


@pytest.mark.parametrize(("family", "name"), APPLIED)
def test_they_are_applied(family: str, name: str, tmp_path: Path) -> None:
    kind = ROPES[name]
    right, other = with_rope(family, kind.parameters), tiny.model(family)
    path = export(other, tmp_path / "m.gguf", kind.keys, factors(right))
    check_applied(path, right, other)


@pytest.mark.parametrize(
    ("family", "name"), [("mixtral", "other factors"), ("deepseek_v3", "yarn, mscale")]
)
def test_they_reach_the_fused_operators(family: str, name: str, tmp_path: Path) -> None:
    kt_kernel()
    kind = ROPES[name]
    right, other = with_rope(family, kind.parameters), tiny.model(family)
    path = export(other, tmp_path / "m.gguf", kind.keys, factors(right))
    check_applied(path, right, other, dense="quantised")


def test_factors_by_context_are_exported_and_refused(tmp_path: Path) -> None:
    rope = {
        **THETA,
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    path = export(with_rope("mixtral", rope), tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match=r"rope\.scaling\.type is 'longrope'"):
        plain(path)


def test_a_loaded_model_is_exported_with_its_factors(tmp_path: Path) -> None:
    right = with_rope("llama", ROPES["other factors"].parameters)
    loaded = plain(export(right, tmp_path / "m.gguf"))
    again = export(loaded, tmp_path / "again.gguf")
    check_applied(again, right, tiny.model("llama"))


def test_a_latent_model_as_current_converters_write_it(tmp_path: Path) -> None:
    """Multi-query form: one key head, lengths of the absorbed form, kv_b in two parts."""
    parameters, keys = ROPES["yarn, mscale"]
    right = with_rope("deepseek_v3", parameters)
    keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "attention.key_length_mla": 32,
        "attention.value_length_mla": 16,
        **keys,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    architecture = architecture_of(right)
    extra = {f"{architecture}.{key}": value for key, value in keys.items()}
    path = tmp_path / "m.gguf"
    export_gguf(right, path, split_kv_b=True, extra=extra)
    check_applied(path, right, tiny.model("deepseek_v3"))
    right.config.save_pretrained(tmp_path)
    plain(path, tmp_path)
