"""Converted checkpoints hold the values of their quantised tensors, also after interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import quantised
import tiny
import torch
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType
from loading import injected, logits, plain
from one_thread import one_torch_thread
from safetensors.torch import load_file, save_file

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.errors import BudgetError, ConfigError, HybriMoEError, WeightsError
from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers.convert import write as writing
from hybrimoe_plugin.hosts.transformers.convert.blocks import mxfp4
from hybrimoe_plugin.hosts.transformers.convert.experts import turned_experts
from hybrimoe_plugin.hosts.transformers.convert.methods import Source
from hybrimoe_plugin.hosts.transformers.convert.write import convert
from hybrimoe_plugin.weights.gguf_store import GGUFStore, dequantize_bytes

__all__ = ["one_torch_thread"]

CASES = (
    ("mixtral", "int4", "Q4_0"),
    ("deepseek_v3", "int4-asymmetric", "Q4_1"),
    ("qwen3_moe", "gptq", "Q4_0"),
    ("mixtral", "gptq-asymmetric", "Q4_1"),
    ("qwen3_moe", "awq", "Q4_1"),
    ("deepseek_v3", "fp8", "Q8_0"),
    ("qwen3_moe", "mxfp4", "MXFP4"),
)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers reads from a directory that is not quantised."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.state_dict())


@pytest.mark.parametrize(("family", "method", "kind"), CASES)
def test_values_are_those_of_the_checkpoint(
    tmp_path: Path, family: str, method: str, kind: str
) -> None:
    if kind not in GGMLQuantizationType.__members__:
        pytest.skip(f"this gguf package does not know {kind}")
    source, right = quantised.write(tmp_path, family, method)
    path = convert(source)
    store = GGUFStore.open(path)
    assert store.info("blk.1.ffn_up_exps.weight").type_name == kind
    found = plain(path, source).state_dict()
    for name, wanted in parameters(right).items():
        check_values(found[name], wanted, kind, name)


def check_values(found: torch.Tensor, wanted: torch.Tensor, kind: str, name: str) -> None:
    """Equal in Q4_0 and MXFP4, else within the error that docs/formats.md states."""
    if kind in ("Q4_0", "MXFP4") or wanted.ndim < 2:
        assert torch.equal(found, wanted), name
        return
    share = 1 / 250 if kind == "Q8_0" else 2**-11
    blocks = wanted.reshape(-1, 32) if wanted.shape[-1] % 32 == 0 else wanted
    error = (found.reshape(blocks.shape) - blocks).abs()
    # Q4_1 rounds only -zero * scale, which is less than the span of the block's values.
    span = blocks.amax(-1) - blocks.amin(-1)
    most = blocks.abs().amax(-1) if kind == "Q8_0" else span
    assert (error <= share * 1.1 * most[..., None] + 1e-7).all(), name


def test_fp8_as_bf16_rounds_each_value_once(tmp_path: Path) -> None:
    source, right = quantised.write(tmp_path, "deepseek_v3", "fp8")
    found = plain(convert(source, tmp_path / "out.gguf", fp8="BF16"), source).state_dict()
    for name, wanted in parameters(right).items():
        torch.testing.assert_close(found[name], wanted, rtol=2**-8, atol=0)


def test_a_converted_model_runs_from_its_own_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, right = quantised.write(tmp_path, "mixtral", "int4")
    with pytest.raises(WeightsError, match=r"\(compressed-tensors\).*hybrimoe convert"):
        injected(source)
    assert main(["convert", str(source)]) == 0
    assert capsys.readouterr().out.strip() == str(source / "model.gguf")
    model = injected(source, dense="dequantised")
    prompt = tiny.tokens(9)
    torch.testing.assert_close(logits(model, prompt), logits(plain(right), prompt))
    model.hybrimoe.close()
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        convert(source)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 10, 17])
def test_an_interrupted_conversion_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    source, _ = quantised.write(tmp_path, "mixtral", "int4")
    whole = convert(source, tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "out.gguf"
    right = writing._write_tensor
    calls: list[str] = []

    def stopping(file: Any, tensor: Any, advance: Any) -> int:
        calls.append(tensor.name)
        if len(calls) > after:
            file.write(b"half a tensor")
            raise Stopped
        return right(file, tensor, advance)

    monkeypatch.setattr(writing, "_write_tensor", stopping)
    with pytest.raises(Stopped):
        convert(source, path)
    assert not path.exists()
    before, after_it = list(calls), after
    monkeypatch.setattr(
        writing, "_write_tensor", lambda *args: calls.append(args[1].name) or right(*args)
    )
    assert convert(source, path).read_bytes() == whole
    again = calls[len(before) :]
    assert not set(before[:after_it]) & set(again)
    assert sorted(file.name for file in tmp_path.glob("out*")) == ["out.gguf"]


def test_what_was_damaged_meanwhile_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = quantised.write(tmp_path, "mixtral", "int4")
    whole = convert(source, tmp_path / "whole.gguf").read_bytes()
    path, part = tmp_path / "out.gguf", tmp_path / "out.gguf.part"
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "replace", _stop)
        with pytest.raises(Stopped):
            convert(source, path)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert convert(source, path).read_bytes() == whole


def _stop(*_args: Any) -> None:
    raise Stopped


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = quantised.write(tmp_path, "mixtral", "int4")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(BudgetError, match="name a file on another disk"):
        convert(source, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


W = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
WRONG: tuple[tuple[Callable[[dict[str, torch.Tensor]], Any], str], ...] = (
    (lambda t: t.pop(f"{W}_scale"), "weight_scale' is missing"),
    (lambda t: t.update({f"{W}_scale": torch.ones(3, 2)}), "scales of shape"),
    (lambda t: t.update({f"{W}_scale": torch.full((256, 2), 1e9)}), "out of float16's range"),
    (lambda t: t.update({f"{W}_scale": torch.full((256, 2), torch.nan)}), "not finite"),
    (lambda t: t.update({f"{W}_shape": torch.tensor([1 << 40, 64])}), "do not hold"),
    (lambda t: t.update({f"{W}_packed": torch.ones(256, 8)}), "expected I32"),
    (lambda t: t.update({f"{W}_g_idx": torch.ones(64)}), "another order"),
    (lambda t: t.update({"model.more": torch.ones(4, dtype=torch.int32)}), "none that"),
    (lambda t: t.update({"model.more": torch.ones(4)}), "no place for 'model.more'"),
    (lambda t: [t.pop(name) for name in list(t) if W in name], "is missing"),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised.write(tmp_path_factory.mktemp("sound"), "mixtral", "int4")[0]


@pytest.mark.parametrize(("edit", "reason"), WRONG)
def test_wrong_tensors_are_refused(
    tmp_path: Path, sound: Path, edit: Callable[[dict[str, torch.Tensor]], Any], reason: str
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=reason):
        convert(folder, tmp_path / "out.gguf")


METHODS = (
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4"}, "nvfp4"),
    ({"quant_method": "gptq", "bits": 3}, "3 bits"),
    (["x"], "None"),
)


@pytest.mark.parametrize(("settings", "reason"), METHODS)
def test_other_methods_are_refused(tmp_path: Path, sound: Path, settings: Any, reason: str) -> None:
    shutil.copytree(sound, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(HybriMoEError, match=reason):
        convert(tmp_path / "source", tmp_path / "out.gguf")


@pytest.mark.skipif("MXFP4" not in GGMLQuantizationType.__members__, reason="an older gguf package")
def test_experts_in_turns_are_those_that_transformers_dequantises() -> None:
    """Of a model whose experts have rows of gate and up in turns, and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = AutoConfig.for_model(
        "gpt_oss",
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=32,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, high: int = 256, low: int = 0) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=generator)
        return drawn.to(torch.uint8)

    prefix = "model.layers.0.mlp.experts"
    packed = {
        f"{prefix}.gate_up_proj": (random(4, 64, 2, 16), random(4, 64, 2, low=110, high=130)),
        f"{prefix}.down_proj": (random(4, 64, 1, 16), random(4, 64, 1, low=110, high=130)),
    }
    right = {
        name: convert_moe_packed_tensors(*parts, dtype=torch.float32)
        for name, parts in packed.items()
    }
    biases = {f"{prefix}.gate_up_proj_bias": torch.randn(4, 64, generator=generator)}
    sources = [
        Source(name, "MXFP4", (4, 64, blocks.shape[2] * 32), rows_of(blocks, scales))
        for name, (blocks, scales) in packed.items()
    ]
    for name, value in biases.items():
        sources.append(Source(name, "F32", (4, 64), lambda n, v=value: v.numpy().view("u1")[n]))
    others, written = turned_experts(sources, model, "here")
    assert not others
    gate_up = right[f"{prefix}.gate_up_proj"].transpose(1, 2)
    bias = biases[f"{prefix}.gate_up_proj_bias"]
    wanted = {
        "blk.0.ffn_gate_exps.weight": gate_up[:, ::2],
        "blk.0.ffn_up_exps.weight": gate_up[:, 1::2],
        "blk.0.ffn_down_exps.weight": right[f"{prefix}.down_proj"].transpose(1, 2),
        "blk.0.ffn_gate_exps.bias": bias[:, ::2],
        "blk.0.ffn_up_exps.bias": bias[:, 1::2],
    }
    assert {tensor.name for tensor in written} == set(wanted)
    for tensor in written:
        raw = np.concatenate([part.reshape(-1) for part in tensor.pieces[0].parts()])
        assert len(raw) == tensor.nbytes
        found = dequantize_bytes(raw, tensor.type_name, tensor.shape)
        assert torch.equal(found, wanted[tensor.name])


@pytest.mark.skipif("MXFP4" not in GGMLQuantizationType.__members__, reason="an older gguf package")
def test_gpt_oss_as_it_was_released_answers_the_same(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    right = shrunk_model("gpt_oss")
    kept = dict(right.state_dict())
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in kept if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, inputs, outputs = kept.pop(name).shape
        shape = experts, outputs, inputs // 32
        packed = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(121, 125, shape, generator=generator).to(torch.uint8)
        kept[f"{name}_blocks"], kept[f"{name}_scales"] = packed, scales
        values = convert_moe_packed_tensors(packed, scales, dtype=torch.float32)
        right.get_parameter(name).data.copy_(values)
    right.config.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    save_file(
        {name: value.contiguous() for name, value in kept.items()}, tmp_path / "model.safetensors"
    )
    path = convert(tmp_path)
    assert GGUFStore.open(path).info("blk.1.ffn_gate_exps.weight").type_name == "MXFP4"
    for directory in (None, tmp_path):
        check_agreement(plain(path, directory), right)
    model = injected(path, accelerator="emulated", cache_ratio=0.25, cpu_backend="torch")
    check_agreement(model, right)
    model.hybrimoe.close()


@pytest.mark.parametrize("method", ["fp8", "int4-asymmetric"])
@pytest.mark.parametrize(
    "model_type", ["granitemoe", "granitemoeshared", "qwen3_5_moe_text", "qwen3_next"]
)
def test_families_that_store_tensors_in_another_form(
    tmp_path: Path, model_type: str, method: str
) -> None:
    if family_of(model_type).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    model = shrunk_model(model_type)
    source, right = quantised.write(tmp_path, model_type, method, model)
    path = convert(source, fp8="BF16")
    found = plain(path, source).state_dict()
    for name, wanted in parameters(right).items():
        # Scales are no powers of two here, so BF16 rounds values; float16 does zero points'.
        torch.testing.assert_close(found[name], wanted, rtol=2**-8, atol=2**-10)


def rows_of(blocks: torch.Tensor, scales: torch.Tensor) -> Any:
    packed = blocks.reshape(-1, *blocks.shape[2:]).numpy()
    exponents = scales.reshape(len(packed), -1).numpy()
    return lambda numbers: mxfp4(packed[numbers], exponents[numbers])


def test_a_family_without_gguf_files_is_refused_by_name(tmp_path: Path) -> None:
    source, _ = quantised.write(tmp_path, "mixtral", "int4")
    config = source / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "jamba"}))
    with pytest.raises(ConfigError, match=r"GGUF files store jamba .* --model_path"):
        convert(source, tmp_path / "out.gguf")
