"""ggml graphs: every type against the dequantised reference, views, refusals."""

from __future__ import annotations

import itertools

import needs
import numpy as np
import pytest
import torch
from ggml_matrices import random_matrix
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.compute.cpu.ggml import TYPES, Ggml, Graph
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

needs.kt_kernel()


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


ROUNDING = {"F32": 1e-6, "F16": 5e-4, "BF16": 4e-3}
"""Relative error of a product whose activations are rounded to the type of a float matrix."""


def rounding_error(x: torch.Tensor, weight: torch.Tensor, type_name: str) -> float:
    """The error that a product [T, N] of x [T, M] must be expected to have, as its norm.

    Kernels round activations to the type of a float matrix, else each block of as many values as
    the matrix's blocks have to 127 steps up to the largest. Such errors are of no order, so their
    squares add up.
    """
    if type_name in ROUNDING:
        return ROUNDING[type_name] * float((x @ weight.T).norm())
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    step = x.unflatten(1, (-1, block)).abs().amax(-1) / 127
    squares = weight.unflatten(1, (-1, block)).square().sum(-1).sum(0)
    return float((squares * step.square() / 12).sum().sqrt())


@pytest.mark.parametrize("type_name", sorted(TYPES))
def test_products_of_every_type_lose_what_rounding_costs(ggml: Ggml, type_name: str) -> None:
    """In every form that is right on this machine; the others are refused."""
    stored = random_matrix(type_name, 48, 512)
    weight = dequantize_bytes(stored.data, type_name, stored.shape).double()
    forms = ggml.forms(type_name)
    assert forms.complete
    for rows, indexed in itertools.product((1, 2, 5, 8, 40), (None, False, True)):
        graph = Graph(ggml, 2)
        x = graph.input(rows, 512)
        plain = forms.row if rows == 1 else forms.rows
        if indexed is False and not plain:
            with pytest.raises(BackendError, match="wrong on this machine"):
                graph.matmul(graph.weight(stored), x, indexed=indexed)
            continue
        y = graph.matmul(graph.weight(stored), x, indexed=indexed)
        graph.finish(y)
        generator = torch.Generator().manual_seed(rows)
        x.value.copy_(torch.randn(rows, 512, generator=generator))
        graph.run()
        assert y.shape == y.value.shape == (rows, 48)
        wanted = x.value.double() @ weight.T
        error = float((y.value - wanted).norm())
        # 48 outputs of one row: 0.7 to 1.2 times what is expected, measured.
        assert error < 1.4 * rounding_error(x.value.double(), weight, type_name)


@pytest.mark.parametrize("type_name", ["Q8_0", "IQ4_XS"])
@pytest.mark.parametrize("indexed", [None, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_head_has_a_matrix_of_its_own(
    ggml: Ggml, type_name: str, indexed: bool | None, rows: int
) -> None:
    """Also through indices, for types whose other kernels are wrong."""
    heads = 3
    whole = random_matrix(type_name, heads * 40, 256)
    stored = whole._replace(shape=(heads, 40, 256))
    weight = dequantize_bytes(whole.data, type_name, stored.shape)
    graph = Graph(ggml, 2)
    x = graph.input(heads, rows, 256)
    y = graph.matmul(graph.weight(stored), x, indexed=indexed)
    graph.finish(graph.add(y, graph.constant(torch.zeros(40))))
    x.value.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(rows)))
    graph.run()
    for head in range(heads):
        wanted = x.value[head] @ weight[head].T
        limit = 1.6 * rounding_error(x.value[head], weight[head], type_name)
        assert float((y.value[head] - wanted).norm()) < limit
    assert not graph.spoiled
    x.value[1, -1, 7] = float("nan")
    graph.run()
    assert graph.spoiled
    graph.spread_nan(rows, [y])
    assert y.value[:, -1].isnan().all()
    assert rows == 1 or not y.value[:, 0].isnan().any()


@pytest.mark.parametrize(
    ("value", "spoiled"),
    [
        (1.0, False),
        (1e30, False),
        (-3e38, False),
        (float("nan"), True),
        (float("inf"), True),
        (float("-inf"), True),
    ],
)
def test_a_graph_knows_when_it_rounded_what_is_no_number(
    ggml: Ggml, value: float, spoiled: bool
) -> None:
    """Large numbers are numbers, also where the sum of their squares is not."""
    graph = Graph(ggml, 1)
    x = graph.input(1, 512)
    weight = graph.weight(random_matrix("Q8_0", 32, 512))
    graph.finish(graph.matmul(weight, x))
    for at in (0, 300):
        x.value.fill_(1.0)
        graph.run()
        assert not graph.spoiled
        x.value[0, at] = value
        graph.run()
        assert graph.spoiled == spoiled


def test_rows_are_dequantised(ggml: Ggml) -> None:
    stored = random_matrix("Q6_K", 32, 256)
    graph = Graph(ggml, 1)
    ids = graph.input(3, dtype=torch.int32)
    rows = graph.rows(graph.weight(stored), ids)
    graph.finish(rows)
    ids.value.copy_(torch.tensor([31, 0, 7]))
    graph.run()
    plain = dequantize_bytes(stored.data, "Q6_K", stored.shape)
    torch.testing.assert_close(rows.value, plain[[31, 0, 7]])


def test_what_the_kernels_must_not_see_is_refused(ggml: Ggml) -> None:
    good = random_matrix("Q8_0", 8, 64)
    strided = np.repeat(good.data, 2)[::2]
    for bad in (
        good._replace(type_name="TQ1_0"),
        good._replace(shape=(8, 96)),
        good._replace(data=good.data[:-1]),
        good._replace(data=strided),
    ):
        with pytest.raises(BackendError):
            Graph(ggml, 1).weight(bad)


def test_parts_of_a_buffer_are_read_and_written_in_place(ggml: Ggml) -> None:
    """Strided views in, a sum and a norm into places of the caller's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    scale = torch.randn(32, generator=generator)
    out = torch.zeros(1, 40)
    graph = Graph(ggml, 2)
    x = graph.input(1, 4 * 48)
    tails = graph.view(x, x.value.view(4, 48)[:, None, 16:])  # [4, 1, 32]
    stored = QuantizedMatrix(weight.numpy().view(np.uint8).reshape(-1), "F32", (6, 32))
    rows = graph.matmul(graph.weight(stored), tails)
    plus = graph.add(rows, graph.constant(torch.arange(6)))
    middle = graph.view(x, x.value[:, 48:80])
    normed = graph.rms_norm(middle, graph.constant(scale), 1e-6, out[:, 8:])
    graph.finish(plus, normed)

    given = torch.randn(1, 4 * 48, generator=generator)
    x.fill(given)
    graph.run()
    wanted = given.view(4, 48)[:, None, 16:] @ weight.T + torch.arange(6)
    torch.testing.assert_close(plus.value, wanted)
    norm = torch.nn.functional.rms_norm(given[:, 48:80], (32,), scale, 1e-6)
    torch.testing.assert_close(out[:, 8:], norm)
    assert not out[:, :8].any()
    assert torch.equal(x.value, given)


def test_more_graphs_live_than_ggml_has_contexts(ggml: Ggml) -> None:
    stored = random_matrix("Q8_0", 4, 32)
    graphs = []
    for _ in range(200):
        graph = Graph(ggml, 1)
        x = graph.input(1, 32)
        y = graph.matmul(graph.weight(stored), x)
        graph.finish(y)
        graphs.append((graph, x, y))
    for value, (graph, x, _) in enumerate(graphs):
        x.value.fill_(float(value))
        graph.run()
    ratio = graphs[150][2].value / graphs[50][2].value
    # Scales of activations are rounded to float16.
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0), rtol=2e-3, atol=0)
