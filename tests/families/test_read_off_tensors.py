"""What no key states is read off the tensors: biases of attention, and layers without experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from loading import injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_config, shrunk_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf

BIASES: list[tuple[str, dict[str, Any]]] = [
    ("dots1", {"attention_bias": True}),
    ("ernie4_5_moe", {"use_bias": True}),
    ("hunyuan_v1_moe", {"attention_bias": True}),
    ("granitemoe", {"attention_bias": True}),
    ("granitemoeshared", {"attention_bias": True}),
    ("olmoe", {"attention_bias": True}),
]
DENSE_LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
    ("qwen3_next", {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
    ("ernie4_5_moe", {"moe_layer_end_index": 2}),
]


def written(model_type: str, changes: dict[str, Any], folder: Path) -> Any:
    """The model, which is in `model.gguf` and config.json of the folder."""
    if family_of(model_type).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    model = shrunk_model(model_type, **changes)
    export_gguf(model, folder / "model.gguf")
    model.config.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("model_type", "changes"), [*BIASES, *DENSE_LAYERS])
def test_a_file_alone_and_with_its_config(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    right = written(model_type, changes, tmp_path)
    check_agreement(plain(tmp_path / "model.gguf"), right)
    model = injected(tmp_path / "model.gguf", tmp_path, accelerator="emulated", cache_ratio=0.25)
    check_agreement(model, right)
    model.hybrimoe.close()


@pytest.mark.parametrize(("model_type", "changes"), DENSE_LAYERS)
def test_kernels_take_dense_layers_too(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    right = written(model_type, changes, tmp_path)
    model = injected(tmp_path / "model.gguf", cpu_backend="auto")
    check_agreement(model, right, rtol=1e-3, atol=1e-4)  # kernels sum in another order
    model.hybrimoe.close()


@pytest.mark.parametrize("changes", [{"clip_qkv": 0.5}, {"norm_topk_prob": True}])
def test_settings_of_olmoe_are_written_and_compared(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    right = written("olmoe", changes, tmp_path)
    check_agreement(plain(tmp_path / "model.gguf"), right)
    check_agreement(plain(tmp_path / "model.gguf", tmp_path), right)
    with pytest.raises(AssertionError):
        check_agreement(shrunk_model("olmoe"), right)
    shrunk_config("olmoe").save_pretrained(tmp_path)
    (name,) = changes
    with pytest.raises(WeightsError, match=f"{name} is (None|False) there"):
        plain(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_oss", {"layer_types": ["full_attention"] * 4}),
        ("gpt_oss", {"swiglu_limit": 5.0}),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}),
    ],
)
def test_what_no_file_can_say_is_not_written(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="cannot say"):
        written(model_type, changes, tmp_path)
