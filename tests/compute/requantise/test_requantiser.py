"""Conversions in C give the bytes of gguf's own, value by value and block by block."""

from __future__ import annotations

from dataclasses import replace

import needs
import numpy as np
import pytest
import stored_types
import tiny_experts
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from hybrimoe_plugin.compute.cpu.requantise import (
    Requantised,
    Requantiser,
    by_type,
    bytes_in,
    replacement,
    supported_weights,
)
from hybrimoe_plugin.compute.cpu.requantise import requantiser as module
from hybrimoe_plugin.errors import BackendError

needs.kt_kernel()

BLOCKS = [kind for kind in stored_types.KINDS if kind not in ("F32", "F16", "BF16")]


def stored(kind: str, rows: int = 3, columns: int = 512) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    return stored_types.stored(values, GGMLQuantizationType[kind]).view(np.uint8).ravel()


@pytest.mark.parametrize("kind", BLOCKS)
def test_bytes_are_those_of_gguf(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several parts, the last of which is smaller."""
    monkeypatch.setattr(module, "_VALUES_AT_A_TIME", 1024)
    raw = stored(kind)
    values = dequantize(raw, GGMLQuantizationType[kind])
    wanted = quantize(values, GGMLQuantizationType.Q8_0)
    in_c = Requantiser(2)
    assert in_c._library is not None
    np.testing.assert_array_equal(in_c.convert(raw, kind, "Q8_0"), wanted.ravel())
    in_c._library = None
    np.testing.assert_array_equal(in_c.convert(raw, kind, "Q8_0"), wanted.ravel())


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_floats(target: str) -> None:
    raw = stored("F32")
    wanted = quantize(raw.view(np.float32), GGMLQuantizationType[target]).view(np.uint8)
    np.testing.assert_array_equal(Requantiser().convert(raw, "F32", target), wanted.ravel())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["Q8_0", "F16", "BF16"])
def test_what_the_target_cannot_hold_is_refused(bad: float, target: str) -> None:
    raw = stored("F32")
    raw.view(np.float32)[700] = bad
    with pytest.raises(BackendError, match=f"F32 are not finite or beyond the range of {target}"):
        Requantiser().convert(raw, "F32", target)


@pytest.mark.skipif("MXFP4" not in stored_types.KINDS, reason="an older gguf package")
def test_mxfp4_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All codes with all scales that float16 holds; smaller values to a multiple of 2^-24."""
    monkeypatch.setattr(module, "_VALUES_AT_A_TIME", 1024)
    blocks = np.random.default_rng(0).integers(0, 256, (144, 17), dtype=np.uint8)
    blocks[:, 0] = np.arange(144)  # from the smallest scale to 2^15
    raw = blocks.ravel()
    made = Requantiser(2).convert(raw, "MXFP4", "Q5_0")
    found = dequantize(made.reshape(144, -1), GGMLQuantizationType.Q5_0)
    wanted = dequantize(blocks, GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(found[104:], wanted[104:])
    np.testing.assert_array_equal(found[:104], np.rint(wanted[:104] * 2**24) / 2**24)
    assert len(np.unique(found[104:])) > 100
    blocks[0, 0] = 144
    with pytest.raises(BackendError, match="MXFP4 are beyond the range of Q5_0"):
        Requantiser(2).convert(raw, "MXFP4", "Q5_0")
    assert replacement("MXFP4", {"Q5_0", "Q8_0"}) == "Q5_0"
    assert replacement("MXFP4", {"Q8_0"}) == "Q8_0"


def test_only_what_has_no_kernel_is_copied() -> None:
    weights = tiny_experts.layer(types=("Q8_0", "Q4_1", "Q8_0"))
    found = supported_weights(weights, {"Q8_0"})
    assert found.gate is weights.gate and found.down is weights.down
    assert found.up.type_name == found.spec.up_type == "Q8_0"
    assert found.spec == replace(weights.spec, up_type="Q8_0", up_bytes=found.up.experts[0].size)
    for expert in (0, 7):
        _, up, _ = weights.dequantized(expert)
        wanted = quantize(up.numpy(), GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(found.up.experts[expert], wanted.ravel())
    assert supported_weights(weights, {"Q8_0", "Q4_1"}) is weights


def test_a_notice_names_a_tensor_and_the_cost() -> None:
    found = [
        Requantised("IQ2_S", "Q8_0", ("a",), 10 << 30, 30 << 30),
        Requantised("MXFP4", "Q8_0", ("b",), 1 << 30, 2 << 30),
        Requantised("IQ2_S", "Q8_0", ("c", "d"), 1 << 30, 3 << 30),
    ]
    first, second = by_type(found)
    assert first.text() == (
        "no CPU kernel for IQ2_S (3 tensors, such as a): requantised to Q8_0, which takes 33.0 GiB "
        "of memory (the file has them in 11.0 GiB)"
    )
    assert second == found[1] and "(b)" in second.text()


def test_bytes_of_types() -> None:
    assert bytes_in("Q8_0", (2, 64)) == 4 * 34
    assert bytes_in("IQ2_XXS", (256,)) == 66
