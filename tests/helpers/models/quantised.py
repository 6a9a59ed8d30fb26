"""Tiny checkpoints of every method, quantised by formulas of their own, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
GROUP = 32
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours is in each place of a word, lowest bits first."""
_FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[R, C / 8] int32 from codes [R, C]."""
    eight = codes.reshape(len(codes), -1, 8).to(torch.int64)
    found = sum(eight[..., neighbour] << (4 * place) for place, neighbour in enumerate(order))
    return torch.as_tensor(found).to(torch.int32)


def integers(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes [N, M], scales and zero points [N, groups], with scales that float16 holds."""
    grouped = weight.reshape(len(weight), -1, GROUP)
    if symmetric:
        scales = (grouped.abs().amax(-1) / 7).to(torch.bfloat16).float()
        zeros = torch.full_like(scales, 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(1, 15)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.reshape(weight.shape), scales, zeros


def values(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    grouped = codes.reshape(len(codes), -1, GROUP)
    return ((grouped - zeros[..., None]) * scales[..., None]).reshape(codes.shape)


def compressed(stem: str, weight: torch.Tensor, symmetric: bool) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = integers(weight, symmetric)
    stored = {
        "weight_packed": words(codes),
        "weight_scale": scales.to(torch.bfloat16 if symmetric else torch.float16),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = words(zeros.T).T
    return _named(stem, stored), values(codes, scales, zeros)


def gptq(stem: str, weight: torch.Tensor, symmetric: bool) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = integers(weight, symmetric)
    stored = {
        "qweight": words(codes).T,
        "scales": scales.half().T,
        "qzeros": words(zeros.T - 1),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return _named(stem, stored), values(codes, scales, zeros)


def awq(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = integers(weight, False)
    stored = {
        "qweight": words(codes.T, _AWQ),
        "scales": scales.half().T,
        "qzeros": words(zeros.T, _AWQ),
    }
    return _named(stem, stored), values(codes, scales, zeros)


def fp8(stem: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    right = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            right[place] = stored[place].float() * scales[i, j]
    return _named(stem, {"weight": stored, "weight_scale_inv": scales}), right


def mxfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = blocks.abs().amax(-1).log2().floor() - 2
    scaled = blocks / exponents[..., None].exp2()
    codes = (scaled.abs()[..., None] - _FP4).abs().argmin(-1)
    right = _FP4[codes] * scaled.sign() * exponents[..., None].exp2()
    signed = (codes + 8 * (scaled < 0)).to(torch.uint8)
    stored = {
        f"{name}_blocks": signed[..., 0::2] | (signed[..., 1::2] << 4),
        f"{name}_scales": (exponents + 127).to(torch.uint8),
    }
    return stored, right.reshape(weight.shape)


def _named(stem: str, tensors: Tensors) -> Tensors:
    return {f"{stem}.{name}": value.contiguous() for name, value in tensors.items()}


METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "int4": (
        lambda stem, weight: compressed(stem, weight, True),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "int4-asymmetric": (
        lambda stem, weight: compressed(stem, weight, False),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "gptq": (
        lambda stem, weight: gptq(stem, weight, True),
        {"quant_method": "gptq", "bits": 4, "sym": True},
    ),
    "gptq-asymmetric": (
        lambda stem, weight: gptq(stem, weight, False),
        {"quant_method": "gptq", "bits": 4, "sym": False},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}


def write(folder: Path, family: str, method: str, model: Any = None) -> tuple[Path, Path]:
    """(directory quantised by a method, directory with the values that this stands for).

    Args:
        model: default the tiny one of the family.
    """
    quantised, right = folder / "quantised", folder / "right"
    stacked = method == "mxfp4"
    (model or tiny.model(family)).save_pretrained(right, save_original_format=not stacked)
    tensors = load_file(right / "model.safetensors")
    quantise, settings = METHODS[method]
    stored: Tensors = {}
    for name, weight in list(tensors.items()):
        chosen = ".experts." in name if stacked else _is_quantised(name, weight)
        if not chosen:
            stored[name] = weight
            continue
        made, tensors[name] = quantise(name if stacked else name.removesuffix(".weight"), weight)
        stored.update(made)
    quantised.mkdir()
    save_file(stored, quantised / "model.safetensors")
    save_file(tensors, right / "model.safetensors", {"format": "pt"})
    config = json.loads((right / "config.json").read_text())
    config["quantization_config"] = settings
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, right


def _is_quantised(name: str, weight: torch.Tensor) -> bool:
    ends = ("proj.weight", "w1.weight", "w2.weight", "w3.weight", "_a_proj_with_mqa.weight")
    is_wide = weight.ndim == 2 and weight.shape[1] % GROUP == 0
    return ".layers." in name and is_wide and name.endswith(ends)
