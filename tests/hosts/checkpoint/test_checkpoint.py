"""Checkpoints in safetensors: the logits of transformers' own loading, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from loading import check_same, injected, logits, plain
from one_thread import one_torch_thread
from safetensors.torch import load_file, save_file

from hybrimoe_plugin.compute.cpu.ggml_stored import expert_matrix
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.checkpoint.open import open_checkpoint

__all__ = ["one_torch_thread"]

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")


def saved(folder: Path, family: str, dtype: torch.dtype, apart: bool = True, **kwargs: Any) -> Path:
    """A tiny model as transformers saves it, with experts in one tensor each or stacked."""
    tiny.model(family).to(dtype).save_pretrained(folder, save_original_format=apart, **kwargs)
    return folder


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    # torch's grouped products, transformers' first choice, have no float64.
    grouped = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **grouped)


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_says_what_transformers_says(tmp_path: Path, family: str, apart: bool) -> None:
    """In float64: in float32 transformers' own rounding takes up half of the tolerance."""
    folder = saved(tmp_path, family, torch.float32, apart)
    prompt, steps = tiny.tokens(21, batch=1), tiny.tokens(4, seed=1)
    check_same(plain(folder), by_transformers(folder), prompt)
    wanted = logits(by_transformers(folder, torch.float64), prompt, steps).float()
    for settings in ({"cpu_backend": "ggml"}, {"accelerator": "emulated", "cache_ratio": 0.25}):
        model = injected(folder, **settings)
        torch.testing.assert_close(logits(model, prompt, steps), wanted)
        model.hybrimoe.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_exact_but_for_the_kernels_input(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Stored values are exact. ggml's kernels round the other factor to the stored type, where
    transformers in that type rounds every result too.
    """
    folder = saved(tmp_path, family, dtype)
    right = by_transformers(folder)
    prompt, steps = tiny.tokens(9), tiny.tokens(3, seed=1)
    model = injected(folder, dense="dequantised")
    check_same(model, right, prompt, steps)
    model.hybrimoe.close()
    model = injected(folder, cpu_backend="ggml")
    found, wanted = logits(model, prompt, steps), logits(right, prompt, steps)
    model.hybrimoe.close()
    rounded = logits(by_transformers(folder, dtype), prompt, steps).float()
    assert (found - wanted).norm() < (rounded - wanted).norm()


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "stacked"])
def test_experts_are_views(tmp_path: Path, apart: bool) -> None:
    folder = saved(tmp_path, "qwen3_moe", torch.bfloat16, apart, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = injected(folder, cpu_backend="ggml", weights="mapped")
    engine = model.hybrimoe.engines[0]
    layer = engine.layers[0]
    files = layer_files(model)
    for matrix, stored in zip(layer.matrices(), graph_matrices(engine), strict=True):
        assert matrix.type_name == "BF16"
        for number, expert in enumerate(matrix.experts):
            assert any(np.shares_memory(expert, file) for file in files)
            assert np.shares_memory(expert, expert_matrix(stored, number).data)
    model.hybrimoe.close()


def layer_files(model: Any) -> list[Any]:
    """The mapped files that a model's experts are read from."""
    return list(model.model.layers[0].mlp.experts.store._bytes)


def graph_matrices(engine: Any) -> tuple[Any, ...]:
    """What the graphs of an engine's first layer read."""
    stored = engine.cpu._layers[0].stored
    return stored.gate, stored.up, stored.down


def test_files_of_older_releases_are_read_at_odd_addresses(tmp_path: Path) -> None:
    """Headers were not padded once, so that tensors begin at any byte."""
    folder = saved(tmp_path, "mixtral", torch.bfloat16)
    right = by_transformers(folder)
    wanted = logits(right, tiny.tokens(9), tiny.tokens(2, seed=1))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert all(info.offset % 2 for info in open_checkpoint(folder).tensors.values())
    model = injected(folder, cpu_backend="ggml", weights="mapped")
    found = logits(model, tiny.tokens(9), tiny.tokens(2, seed=1))
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    model.hybrimoe.close()
    model = injected(folder, accelerator="emulated", dense="dequantised")
    found = logits(model, tiny.tokens(9), tiny.tokens(2, seed=1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    model.hybrimoe.close()


def test_layers_that_look_ahead_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path, "deepseek_v3", torch.float32)
    add(folder, "model.layers.2.eh_proj.weight", torch.ones(4, 4))
    add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    check_same(plain(folder), by_transformers(folder), tiny.tokens(5))


def test_a_tied_head_may_be_there_again_and_not_another(tmp_path: Path) -> None:
    tiny.model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    add(tmp_path, "lm_head.weight", embedding.clone())
    check_same(plain(tmp_path), by_transformers(tmp_path), tiny.tokens(5))
    add(tmp_path, "lm_head.weight", embedding + 1)
    with pytest.raises(WeightsError, match=r"no place for 'lm_head\.weight'"):
        plain(tmp_path)


def add(folder: Path, name: str, value: torch.Tensor) -> None:
    change(folder, lambda tensors: tensors.update({name: value}))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sound"), "mixtral", torch.float32)


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
EDITS = (
    (lambda tensors: tensors.pop(EXPERT), "8 experts, found 7"),
    (lambda tensors: tensors.update({EXPERT: torch.ones(3, 64)}), r"is \(3, 64\) in F32, expected"),
    (
        lambda tensors: tensors.update({EXPERT: tensors[EXPERT].bfloat16()}),
        "in BF16, expected .* in F32",
    ),
    (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
        r"'model\.norm\.weight' is stored as I32.*hybrimoe convert",
    ),
    (
        lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.ones(4)}),
        r"no place for 'model\.layers\.0\.self_attn\.sinks'",
    ),
)


@pytest.mark.parametrize(("edit", "reason"), EDITS)
def test_other_tensors_are_refused_by_name(
    tmp_path: Path, sound: Path, edit: Callable[[dict[str, torch.Tensor]], Any], reason: str
) -> None:
    copied(sound, tmp_path)
    change(tmp_path, edit)
    with pytest.raises(WeightsError, match=reason):
        injected(tmp_path)


def test_quantised_weights_are_refused_by_method(tmp_path: Path, sound: Path) -> None:
    copied(sound, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"quantised \(fp8\).*hybrimoe convert"):
        injected(tmp_path)


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HOSTILE = (
    (b"", "is empty"),
    (b"\xff" * 8, "ends beyond the file"),
    (struct.pack("<Q", 1 << 40) + b"{}", "ends beyond the file"),
    (struct.pack("<Q", 3) + b"[1]", "no JSON object"),
    (struct.pack("<Q", 50_000) + b"[" * 50_000, "cannot be read"),
    (header(a=entry(dtype="F7")) + bytes(8), "unknown type 'F7'"),
    (header(a=entry(shape=[1 << 62] * 8)) + bytes(8), "does not take 8 bytes"),
    (header(a=entry(shape=[-2])) + bytes(8), "no valid shape"),
    (header(a=entry(data_offsets=[0, 1 << 60])) + bytes(8), "not within the file"),
    (header(a=entry(data_offsets=[8, 0])) + bytes(8), "not within the file"),
    (header(a=entry(), b=entry()) + bytes(8), "shares bytes"),
    (header(a=7), "no valid shape|unknown type"),
    (struct.pack("<Q", 15) + b'{"a":1,"a":  2}', "occurs twice"),
)


@pytest.mark.parametrize(("data", "reason"), HOSTILE)
def test_damaged_files_are_refused(tmp_path: Path, sound: Path, data: bytes, reason: str) -> None:
    copied(sound, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=reason):
        open_checkpoint(tmp_path)


INDICES = (
    ({"weight_map": {"a": "../model.safetensors"}}, "no file's name"),
    ({"weight_map": {"a": 3}}, "no file's name"),
    ({"weight_map": {"a": "gone.safetensors"}}, r"1 of 1 files are missing: gone"),
    ({"weight_map": {"a": "model.safetensors"}}, "'a' is in model.safetensors, and it is not"),
    ({}, "no weight_map"),
)


@pytest.mark.parametrize(("index", "reason"), INDICES)
def test_wrong_indices_are_refused(
    tmp_path: Path, sound: Path, index: dict[str, Any], reason: str
) -> None:
    copied(sound, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=reason):
        open_checkpoint(tmp_path)


def copied(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
