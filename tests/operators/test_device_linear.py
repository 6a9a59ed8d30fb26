"""Linears on quantised matrices in device memory, by kernel and by their plain twin."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_cases import random_matrix
from torch import nn

from eval.kernel_cases.shapes import TYPES
from eval.models.blocks import block_values
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.operators import device_linear as module
from hybrimoe_plugin.operators.device_linear import DeviceLinear
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


def made(
    kind: str, rows: int, columns: int, bias: bool = False
) -> tuple[DeviceLinear, torch.Tensor]:
    """(operator, float64 matrix)."""
    matrix = random_matrix(np.random.default_rng(0), 1, rows, columns, kind)
    plain = nn.Linear(columns, rows, bias=bias)
    operator = DeviceLinear(
        "lm_head", None, SimpleNamespace(hidden_act="silu"), plain, dense="dequantised"
    )
    operator.take(QuantizedMatrix(matrix.experts[0], kind, (rows, columns)))
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return operator.to(device), dequantize_bytes(matrix.experts[0], kind, (rows, columns)).double()


@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("kind", TYPES)
def test_kernel_and_twin_equal_the_reference(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    columns = 256 if block_values(kind) == 256 else 96
    operator, matrix = made(kind, 80, columns, bias=True)
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(0))
    wanted = x.double() @ matrix.T + operator.bias.cpu().double()
    x = x.to(operator.planes.device)
    torch.testing.assert_close(operator(x).cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(DeviceLinear, "_has_kernel", lambda self: False)
    torch.testing.assert_close(operator(x).cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_other_types_take_the_twin() -> None:
    operator, matrix = made("F32", 8, 32)
    assert not operator._has_kernel()
    x = torch.randn(3, 32).to(operator.planes.device)
    torch.testing.assert_close(
        operator(x).cpu().double(), x.cpu().double() @ matrix.T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_type_without_a_kernel_is_dequantised_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows at a time, to what the plain linear would hold; and not at each call."""
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "stays_stored", lambda kind: kind != "Q3_K")
    monkeypatch.setattr(module, "_VALUES_AT_A_TIME", 1024)
    matrix = random_matrix(np.random.default_rng(0), 1, 10, 512, "Q3_K")
    values = dequantize_bytes(matrix.experts[0], "Q3_K", (10, 512))
    plain = nn.Linear(512, 10, bias=False, dtype=dtype, device="meta")
    operator = DeviceLinear("lm_head", None, None, plain, dense="dequantised")
    operator.take(QuantizedMatrix(matrix.experts[0], "Q3_K", (10, 512)))
    assert operator.dense_bytes("Q3_K") == operator.dense.nbytes == 5120 * dtype.itemsize
    assert operator.dense_bytes("Q8_0") == operator.planes.numel() == 0
    monkeypatch.setattr(module, "dequantize", None)
    assert torch.equal(operator.dense, values.to(dtype))
    assert torch.equal(operator.dequantised(), values.to(dtype).float())
    x = torch.randn(3, 512).to(dtype)
    assert torch.equal(operator(x), nn.functional.linear(x, values.to(dtype)))


def test_what_is_refused() -> None:
    operator, _ = made("Q8_0", 8, 32)
    with pytest.raises(BackendError, match=r"\(8, 32\)"):
        operator.take(QuantizedMatrix(np.zeros(34, np.uint8), "Q8_0", (1, 32)))
    with pytest.raises(BackendError, match="Q8_K"):
        operator.take(QuantizedMatrix(np.zeros(34, np.uint8), "Q8_K", (8, 32)))
    fresh = DeviceLinear(
        "lm_head", None, SimpleNamespace(hidden_act="silu"), nn.Linear(32, 8), dense="dequantised"
    )
    with pytest.raises(BackendError, match="not given its matrix"):
        fresh(torch.ones(1, 32))
    assert list(fresh.state_dict()) == ["bias"], "the loader must not look for a weight"
