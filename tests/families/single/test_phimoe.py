"""Phi-MoE: biases, and a rotary embedding that depends on the length of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from loading import check_applied, injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_config, shrunk_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf
from hybrimoe_plugin.weights.gguf_store import GGUFStore

pytestmark = pytest.mark.skipif(
    "phimoe" not in MODEL_ARCH_NAMES.values(), reason="this gguf package does not know phimoe"
)
RELEASED = 1.243163121016122


def rope(**changes: Any) -> dict[str, Any]:
    """As Phi-3.5-MoE has it, with a first training on 16 tokens."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
        "short_mscale": RELEASED,
        "long_mscale": RELEASED,
        **changes,
    }


AS_RELEASED = {
    "attention_bias": True,
    "lm_head_bias": True,
    "sliding_window": 256,
    "rope_parameters": rope(),
}


def made(**changes: Any) -> Any:
    return shrunk_model("phimoe", **{**AS_RELEASED, **changes})


def test_the_released_form_from_a_file_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = made()
    export_gguf(right, tmp_path / "m.gguf")
    held = GGUFStore.open(tmp_path / "m.gguf").tensors
    for name in ("rope_factors_long.weight", "output.bias", "blk.0.attn_q.bias"):
        assert name in held
    model = plain(tmp_path / "m.gguf")
    check_agreement(model, right)
    assert "does not state short_mscale and long_mscale" in caplog.text


def test_experts_on_kernels_beside_the_config(tmp_path: Path) -> None:
    right = made(rope_parameters=rope(short_mscale=1.1, long_mscale=1.3))
    export_gguf(made(), tmp_path / "m.gguf")
    right.config.save_pretrained(tmp_path)
    model = injected(
        tmp_path / "m.gguf", tmp_path, cpu_backend="auto", accelerator="emulated", cache_ratio=0.25
    )
    check_agreement(model, right, rtol=1e-3, atol=1e-4)  # kernels sum in another order
    model.hybrimoe.close()


def test_a_scale_of_its_own_is_read(tmp_path: Path) -> None:
    right, other = made(rope_parameters=rope(short_mscale=0.7, long_mscale=0.7)), made()
    export_gguf(right, tmp_path / "m.gguf")
    check_applied(tmp_path / "m.gguf", right, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"long_factor": [1.0] * 8},
        {"short_factor": [1.0] * 8},
        {"original_max_position_embeddings": 32},
    ],
)
def test_another_rotary_embedding_in_the_config_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    export_gguf(made(), tmp_path / "m.gguf")
    changed = {**AS_RELEASED, "rope_parameters": rope(**changes)}
    shrunk_config("phimoe", **changed).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="rope_parameters is"):
        plain(tmp_path / "m.gguf", tmp_path)


def test_a_plain_rotary_embedding_beside_such_a_file_is_refused(tmp_path: Path) -> None:
    export_gguf(made(), tmp_path / "m.gguf")
    shrunk_config("phimoe").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="does not match"):
        plain(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"router_jitter_noise": 0.2},
        {"rope_parameters": rope(short_mscale=1.1)},
    ],
)
def test_what_no_file_can_say_is_not_written(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot say"):
        export_gguf(made(**changes), tmp_path / "m.gguf")
