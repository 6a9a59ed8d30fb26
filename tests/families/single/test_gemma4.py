"""Gemma 4: heads and rotary embeddings of two kinds, as released files of its MoE have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import MODEL_ARCH_NAMES
from loading import injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_config, shrunk_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf
from hybrimoe_plugin.weights.gguf_store import GGUFStore

pytestmark = pytest.mark.skipif(
    "gemma4" not in MODEL_ARCH_NAMES.values(), reason="this gguf package does not know gemma4"
)
FULL = {"head_dim": 32, "num_key_value_heads": 1}
AS_RELEASED = {
    "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
    "per_layer_config": {"1": FULL, "3": FULL},
}


def made(**changes: Any) -> Any:
    """Keys serve as values in layers with full attention, and those have fewer heads."""
    model = shrunk_model("gemma4_text", **{**AS_RELEASED, **changes})
    for number, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.5 + 0.25 * number)
    return model


def rope(part: float = 0.25, base: float = 1e4) -> dict[str, Any]:
    return {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": part,
            "rope_theta": 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": base},
    }


def test_the_released_form_from_a_file_alone(tmp_path: Path) -> None:
    right = made()
    export_gguf(right, tmp_path / "m.gguf")
    store = GGUFStore.open(tmp_path / "m.gguf")
    assert store.metadata["gemma4.attention.head_count_kv"] == [2, 1, 2, 1]
    assert store.metadata["gemma4.attention.key_length_swa"] == 16
    assert store.dequantized("rope_freqs.weight").tolist() == pytest.approx([1.0] * 4 + [1e30] * 12)
    assert "blk.1.attn_v.weight" not in store.tensors
    model = plain(tmp_path / "m.gguf")
    check_agreement(model, right)
    assert model.config.rope_parameters == right.config.rope_parameters


def test_quantised_beside_the_config_of_a_model_with_pictures(tmp_path: Path) -> None:
    right = made()
    quantised = ("_exps.weight", "token_embd.weight")
    export_gguf(
        right, tmp_path / "m.gguf", types=lambda name: "Q8_0" if name.endswith(quantised) else "F32"
    )
    text = json.loads(right.config.to_json_string(use_diff=False))
    whole = {"model_type": "gemma4", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    wanted = plain(tmp_path / "m.gguf")  # of the same rounded weights
    model = injected(tmp_path / "m.gguf", tmp_path, accelerator="emulated", cache_ratio=0.25)
    check_agreement(model, wanted)
    model.hybrimoe.close()


@pytest.mark.parametrize("part", [1 / 3, 0.5, 1.0])
def test_any_part_of_a_head_may_turn(part: float, tmp_path: Path) -> None:
    full = {"head_dim": 48}
    right = made(rope_parameters=rope(part), per_layer_config={"1": full, "3": full})
    export_gguf(right, tmp_path / "m.gguf")
    check_agreement(plain(tmp_path / "m.gguf"), right)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": rope(base=500.0)}, r"rope_theta is 500\.0 there and 10000\.0"),
        ({"rope_parameters": rope(part=0.5)}, "'partial_rotary_factor': 0.5, .* 0.25"),
        ({"per_layer_config": {"1": FULL, "3": {"head_dim": 32}}}, r"\[2, 1, 2, 2\] there"),
        ({"per_layer_config": {"3": FULL}}, r"head_dim by layer is \[16, 16, 16, 32\] there"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types is"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is None there and 30"),
        ({"hidden_activation": "silu"}, "hidden_activation is silu there"),
    ],
)
def test_another_config_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_gguf(made(), tmp_path / "m.gguf")
    shrunk_config("gemma4_text", **{**AS_RELEASED, **changes}).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=message):
        plain(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.sliding_window_pattern", [True, False], "for each of 4 layers"),
        ("attention.sliding_window_pattern", [False, False, False, True], "must have full"),
        ("attention.head_count_kv", [2, 3, 2, 1], "must divide"),
        ("attention.head_count_kv", [2, 1], "for 4 layers"),
        ("attention.value_length_swa", 8, "value_length_swa is 8"),
        ("rope.dimension_count", 8, "dimension_count is 8"),
        ("attention.shared_kv_layers", 2, "shared_kv_layers is 2"),
        ("embedding_length_per_layer_input", 16, "per_layer_input is 16"),
        ("rope.scaling.type", "yarn", "rope.scaling"),
    ],
)
def test_what_a_file_may_not_state(key: str, value: Any, message: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {f"gemma4.{key}": value}
    if value == "yarn":
        extra["gemma4.rope.scaling.factor"] = 4.0
    export_gguf(made(), tmp_path / "m.gguf", extra=extra)
    with pytest.raises(WeightsError, match=message):
        plain(tmp_path / "m.gguf")


def test_other_factors_are_kept_apart_from_the_window_layers(tmp_path: Path) -> None:
    """Layers with a window never have the factors of the file."""
    right = made()
    export_gguf(right, tmp_path / "m.gguf")
    model = plain(tmp_path / "m.gguf")
    sliding = model.model.rotary_emb.sliding_attention_inv_freq
    torch.testing.assert_close(sliding, right.model.rotary_emb.sliding_attention_inv_freq)
    assert model.model.rotary_emb.full_attention_inv_freq.count_nonzero() == 4
