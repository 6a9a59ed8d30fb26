"""Hunyuan-A13B: its config states a rotary embedding by `alpha`, its GGUF files by the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from loading import injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf
from hybrimoe_plugin.weights.gguf_store import GGUFStore

pytestmark = pytest.mark.skipif(
    "hunyuan-moe" not in MODEL_ARCH_NAMES.values(), reason="this gguf package does not know Hunyuan"
)
THETA, ALPHA, WIDTH = 10000.0, 1000.0, 16
BASE = THETA * ALPHA ** (WIDTH / (WIDTH - 2))
AS_CONVERTED = {
    "hunyuan-moe.rope.scaling.type": "none",
    "hunyuan-moe.rope.scaling.factor": 1.0,
    "hunyuan-moe.rope.scaling.original_context_length": 256,
}


def made(alpha: float = ALPHA) -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": THETA, "alpha": alpha, "factor": 1.0}
    return shrunk_model("hunyuan_v1_moe", rope_parameters=rope)


def write_config(model: Any, folder: Path, alpha: float = ALPHA) -> None:
    """With the lists by layer and the older names that the released config has."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    layers = values["num_hidden_layers"]
    del values["rope_parameters"]
    values |= {
        "rope_theta": THETA,
        "rope_scaling": {
            "type": "dynamic",
            "alpha": alpha,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "moe_topk": [2] * layers,
        "num_shared_expert": [1] * layers,
        "moe_intermediate_size": [values["intermediate_size"]] * layers,
        "auto_map": {"AutoConfig": "configuration_hunyuan.HunYuanConfig"},
    }
    (folder / "config.json").write_text(json.dumps(values))


def test_the_base_is_written_and_read(tmp_path: Path) -> None:
    right = made()
    export_gguf(right, tmp_path / "m.gguf", extra=AS_CONVERTED)
    stated = GGUFStore.open(tmp_path / "m.gguf").metadata["hunyuan-moe.rope.freq_base"]
    assert stated == pytest.approx(BASE)
    check_agreement(plain(tmp_path / "m.gguf"), right)


def test_a_file_with_its_config(tmp_path: Path) -> None:
    right = made()
    export_gguf(right, tmp_path / "m.gguf", extra=AS_CONVERTED)
    write_config(right, tmp_path)
    model = injected(tmp_path / "m.gguf", tmp_path, accelerator="emulated", cache_ratio=0.25)
    check_agreement(model, right)
    model.hybrimoe.close()


def test_another_alpha_is_refused(tmp_path: Path) -> None:
    export_gguf(made(), tmp_path / "m.gguf")
    write_config(made(), tmp_path, alpha=500.0)
    with pytest.raises(WeightsError, match="rope_theta is"):
        plain(tmp_path / "m.gguf", tmp_path)
