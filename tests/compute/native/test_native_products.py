"""Products by the operations against float64: types, numbers of rows, odd shapes, batches."""

from __future__ import annotations

import pytest
import torch
from ggml_matrices import random_matrix
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.compute.cpu.ggml import TYPES, Ggml
from hybrimoe_plugin.compute.cpu.ggml.runtime import Forms
from hybrimoe_plugin.compute.cpu.native import kernels as kernels_module
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.kernels import EXACT, OWN_DOTS, Kernels, operations
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

EIGHT_BITS = 0.012
"""Relative error of a product whose activations are rounded to 8 bits; 0.5 to 0.8 % measured."""
BFLOAT16 = 0.004
"""Relative error of a product whose factors are rounded to 8 bits of mantissa."""
ROUNDING = {"F32": 1e-6, "F16": 5e-4, "BF16": BFLOAT16}


@pytest.fixture
def graph(ggml: Ggml, kernels: Kernels) -> NativeGraph:
    return NativeGraph(ggml, kernels, 2)


def limit(type_name: str, rows: int, kernels: Kernels) -> float:
    """What rounding may cost."""
    if rows >= 4 and kernels.tiles and type_name not in EXACT:
        return BFLOAT16
    return ROUNDING.get(type_name, EIGHT_BITS)


def values_of(stored: QuantizedMatrix) -> torch.Tensor:
    return dequantize_bytes(stored.data, stored.type_name, stored.shape).double()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def product(graph: NativeGraph, stored: QuantizedMatrix, x: torch.Tensor) -> torch.Tensor:
    out = graph.matmul(graph.weight(stored), graph.view(graph.input(1), x))
    graph.finish(out)
    graph.run()
    return out.value


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 15, 16, 17, 33])
@pytest.mark.parametrize("type_name", sorted(TYPES))
def test_every_type(
    graph: NativeGraph, kernels: Kernels, ggml: Ggml, type_name: str, rows: int
) -> None:
    assert ggml.computes(type_name)
    stored = random_matrix(type_name, 70, 512)
    x = random(rows, 512)
    wanted = x.double() @ values_of(stored).T
    assert error(product(graph, stored, x), wanted) < limit(type_name, rows, kernels)


@pytest.mark.parametrize("rows", [1, 5, 600])
@pytest.mark.parametrize("count", [1, 7, 31, 33, 130])
@pytest.mark.parametrize("columns", [32, 96, 4096, 4128, 9216])
def test_odd_shapes(
    graph: NativeGraph, kernels: Kernels, rows: int, count: int, columns: int
) -> None:
    """Panels, tiles and pieces of long rows that are not full."""
    stored = random_matrix("Q8_0", count, columns)
    x = random(rows, columns)
    wanted = x.double() @ values_of(stored).T
    scale = x.double().norm(dim=1)[:, None] * values_of(stored).norm(dim=1)
    found = (product(graph, stored, x).double() - wanted) / scale
    assert float(found.abs().max()) < 5 * limit("Q8_0", rows, kernels)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6, 7, 130])
@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
@pytest.mark.parametrize("type_name", sorted(OWN_DOTS))
def test_own_dots_are_ggml_s_but_for_the_order_of_sums(
    ggml: Ggml, type_name: str, count: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of rows that are not full, and halves of pairs of blocks."""
    if not operations.vnni:
        pytest.skip("this processor has no VNNI")
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    stored = random_matrix(type_name, count, blocks * block)
    x = 30 * random(1, blocks * block)
    found = product(NativeGraph(ggml, Kernels(ggml.binding), 2), stored, x)
    monkeypatch.setattr(kernels_module, "OWN_DOTS", frozenset())
    wanted = product(NativeGraph(ggml, Kernels(ggml.binding), 2), stored, x)
    scale = x.norm() * values_of(stored).norm(dim=1)
    assert float(((found - wanted).abs() / scale).max()) < 1e-6


@pytest.mark.parametrize("type_name", sorted(OWN_DOTS))
def test_own_dots_at_the_ends_of_their_codes(ggml: Ggml, kernels: Kernels, type_name: str) -> None:
    """Activations of 127 steps in every place, of one sign and of both: no sum overflows."""
    stored = random_matrix(type_name, 64, 2048)
    for x in (torch.ones(1, 2048), -torch.ones(1, 2048), random(1, 2048).sign()):
        found = product(NativeGraph(ggml, kernels, 2), stored, x)
        torch.testing.assert_close(
            found.double(), x.double() @ values_of(stored).T, rtol=1e-3, atol=1e-2
        )


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_rows_that_no_tile_divides(graph: NativeGraph, kernels: Kernels, type_name: str) -> None:
    """48 columns: a tile has 32."""
    stored = random_matrix(type_name, 20, 48)
    x = random(40, 48)
    wanted = x.double() @ values_of(stored).T
    assert error(product(graph, stored, x), wanted) < ROUNDING[type_name]


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K", "F32", "BF16"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_batch_of_matrices(
    graph: NativeGraph, kernels: Kernels, type_name: str, rows: int
) -> None:
    """As of latent attention's heads, from a view of wider rows into one of wider results."""
    heads, count, columns = 5, 40, 256
    whole = random_matrix(type_name, heads * count, columns)
    stored = whole._replace(shape=(heads, count, columns))
    x = random(heads, rows, columns + 64)[..., :columns]
    out = torch.full((heads, rows, count + 8), 7.0)
    node = graph.view(graph.input(1), x)
    graph.finish(graph.matmul(graph.weight(stored), node, out[..., :count]))
    graph.run()
    for head in range(heads):
        wanted = x[head].double() @ values_of(stored)[head].T
        assert error(out[head, :, :count], wanted) < limit(type_name, rows, kernels)
    assert (out[..., count:] == 7).all()


def test_several_rows_that_lie_apart(graph: NativeGraph, kernels: Kernels) -> None:
    stored = random_matrix("Q4_0", 64, 128)
    x = random(50, 320)[:, 128:256]
    wanted = x.double() @ values_of(stored).T
    assert error(product(graph, stored, x), wanted) < limit("Q4_0", 50, kernels)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q6_K", "IQ3_S", "F16", "BF16", "F32"])
def test_without_ggml_s_dot(
    ggml: Ggml, kernels: Kernels, type_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor where that is wrong: rows are dequantised, and nothing is rounded."""
    monkeypatch.setattr(Ggml, "forms", lambda *_: Forms(True, True, indexed=False, lookup=True))
    stored = random_matrix(type_name, 40, 4608)
    x = random(2, 4608)
    wanted = x.double() @ values_of(stored).T
    assert error(product(NativeGraph(ggml, kernels, 2), stored, x), wanted) < 1e-6


def test_a_type_that_is_dequantised_wrongly_is_refused(
    graph: NativeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ggml, "forms", lambda *_: Forms(True, True, True, lookup=False))
    weight = graph.weight(random_matrix("Q8_0", 4, 32))
    with pytest.raises(BackendError, match="Q8_0"):
        graph.matmul(weight, graph.input(1, 32))


def test_shapes_that_do_not_fit_are_refused(graph: NativeGraph) -> None:
    weight = graph.weight(random_matrix("Q8_0", 4, 64))
    for x in (graph.input(1, 32), graph.input(1, 128)):
        with pytest.raises(BackendError, match="fit"):
            graph.matmul(weight, x)
    stack = random_matrix("Q8_0", 12, 64)._replace(shape=(3, 4, 64))
    with pytest.raises(BackendError, match="fit"):
        graph.matmul(graph.weight(stack), graph.input(2, 1, 64))


def test_a_matrix_of_the_caller_s_own(graph: NativeGraph) -> None:
    """Rotations of cos and sin, or a router's float weights."""
    weight, x = graph.input(24, 40), graph.input(3, 40)
    out = graph.matmul(weight, x)
    graph.finish(out)
    for _ in range(2):
        weight.fill(random(24, 40))
        x.fill(random(3, 40))
        graph.run()
        assert error(out.value, x.value.double() @ weight.value.double().T) < 1e-6


def test_activations_are_converted_anew_after_they_were_written(graph: NativeGraph) -> None:
    """One buffer, read by a product before and after an operation on it."""
    stored = random_matrix("Q8_0", 32, 64)
    x = graph.input(1, 64)
    first = graph.matmul(graph.weight(stored), x)
    changed = graph.add(x, x)
    second = graph.matmul(graph.weight(stored), changed)
    graph.finish(first, second)
    x.fill(random(1, 64))
    graph.run()
    torch.testing.assert_close(second.value, 2 * first.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("type_name", sorted(TYPES))
def test_rows_are_dequantised(graph: NativeGraph, type_name: str) -> None:
    stored = random_matrix(type_name, 32, 512)
    ids = graph.input(4, dtype=torch.int32)
    rows = graph.rows(graph.weight(stored), ids)
    graph.finish(rows)
    ids.value.copy_(torch.tensor([31, 0, 7, 7]))
    graph.run()
    torch.testing.assert_close(rows.value, values_of(stored)[[31, 0, 7, 7]].float())


def test_blocks_divide_the_pieces_of_a_row() -> None:
    """Tiles and dequantised rows cut rows every 4096 values."""
    for name in TYPES:
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert 4096 % block == 0
