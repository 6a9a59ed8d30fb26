"""A pack carries all that its model's file states, or is not made; one that lacks anything is not
loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loading import logits
from safetensors.torch import load_file, save_file
from stated import export, factors

from hybrimoe_plugin.errors import FlashError, WeightsError
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of
from lever_ext.flash.source import StateDictSource
from lever_ext.flash.writer import write_pack
from lever_ext.packing import pack_model, plain_config
from lever_ext.target import load_target

ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    **ROPE,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    **ROPE,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 3.0,
    "attention_factor": 1.4,
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_beta_fast": 8.0,
    "rope.scaling.yarn_beta_slow": 3.0,
    "rope.scaling.yarn_attn_factor": 1.4,
}


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        ("llama", {"rope_parameters": LLAMA3}, {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
        ("qwen3", {"rope_parameters": YARN, "attention_bias": True}, YARN_KEYS),
        ("mixtral", {"rope_parameters": LLAMA3}, {}),
        ("mixtral", {"sliding_window": 8}, {"attention.sliding_window": 8}),
        (
            "qwen3_moe",
            {"rope_parameters": YARN, "attention_bias": True, "norm_topk_prob": False},
            YARN_KEYS,
        ),
        ("qwen2_moe", {"qkv_bias": False}, {}),
    ],
)
def test_a_pack_answers_as_the_model(family: str, changes: Any, keys: Any, tmp_path: Path) -> None:
    right = tiny.model(family, **changes)
    pack_model(tmp_path, None, export(right, tmp_path / "m.gguf", keys, factors(right)), "float32")
    target = load_target(tmp_path)
    prompt, steps = tiny.tokens(80), tiny.tokens(2, seed=1)
    wanted = logits(right, prompt, steps)
    torch.testing.assert_close(logits(target.model, prompt, steps), wanted, rtol=1e-4, atol=1e-4)
    assert (logits(tiny.model(family), prompt, steps) - wanted).abs().max() > 1e-2
    target.close()


def test_what_a_pack_would_lose_is_not_packed(tmp_path: Path) -> None:
    unknown = {"blk.0.attn_q.bias": torch.ones(64)}
    with pytest.raises(WeightsError, match=r"no place for 'blk\.0\.attn_q\.bias'"):
        pack_model(
            tmp_path,
            None,
            export(tiny.model("mixtral"), tmp_path / "m.gguf", None, unknown),
            "float32",
        )


def test_unread_tensors_of_a_model_directory_are_named(tmp_path: Path) -> None:
    tiny.model("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    fine = {
        "model.layers.2.eh_proj.weight": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file({**held, **fine}, path, {"format": "pt"})
    pack_model(tmp_path / "pack", tmp_path, None, "float32")
    save_file({**held, "model.layers.0.self_attn.sinks": torch.ones(4)}, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"no place for 'model\.layers\.0\.self_attn\.sinks'"):
        pack_model(tmp_path / "other", tmp_path, None, "float32")


@pytest.mark.parametrize("biased", ["weights", "config"])
def test_a_pack_whose_config_has_other_tensors_is_refused(biased: str, tmp_path: Path) -> None:
    with_bias, without = (
        plain_config(tiny.config("llama", attention_bias=bias)) for bias in (True, False)
    )
    weights, said = (with_bias, without) if biased == "weights" else (without, with_bias)
    source = StateDictSource(
        dict(tiny.model("llama", attention_bias=biased == "weights").state_dict()), "tiny"
    )
    write_pack(source, meta_model_of(weights, torch.float32), said, tmp_path, "float32")
    with pytest.raises(
        FlashError, match=r"(lacks|holds) 'model\.layers\.0\.self_attn\.q_proj\.bias'"
    ):
        load_target(tmp_path)
