"""Operations on rows: norms, SiLU, sums; and what is no number."""

from __future__ import annotations

import math

import pytest
import torch
from ggml_matrices import random_matrix
from torch.nn import functional

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.errors import BackendError

WIDTHS = (1, 7, 8, 33, 768, 5121)
SIZES = (0.0, 1e-30, 0.5, 20, 87.5, 88.5, 100, 1e4, 1e30)
FAR = [*SIZES, *(-size for size in SIZES)]


@pytest.fixture
def graph(ggml: Ggml, kernels: Kernels) -> NativeGraph:
    return NativeGraph(ggml, kernels, 2)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_1", "Q4_K", "IQ4_XS", "BF16", "F16", "F32"])
def test_a_row_with_no_number_gives_none(
    graph: NativeGraph, type_name: str, rows: int, bad: float
) -> None:
    """And no other row is touched by it, in this run or the next."""
    weight = graph.weight(random_matrix(type_name, 40, 512))
    x = graph.input(rows, 512)
    out = graph.matmul(weight, x)
    graph.finish(out)
    x.fill(random(rows, 512))
    graph.run()
    wanted = out.value.clone()
    assert wanted.isfinite().all()
    for at in (0, 300, 511):
        row = at % rows
        x.fill(random(rows, 512))
        x.value[row, at] = bad
        graph.run()
        assert not out.value[row].isfinite().any()
        others = torch.arange(rows) != row
        assert torch.equal(out.value[others], wanted[others])
    x.fill(random(rows, 512))
    graph.run()
    assert torch.equal(out.value, wanted)


@pytest.mark.parametrize("value", [5e6, -5e6, 1e-38, 0.0])
@pytest.mark.parametrize("rows", [1, 20])
def test_large_and_small_numbers_are_numbers(graph: NativeGraph, value: float, rows: int) -> None:
    """The scale of a block of 8 bits is a half: ggml gives none from 127 times 65504 on."""
    x = graph.input(rows, 512)
    out = graph.matmul(graph.weight(random_matrix("Q8_0", 32, 512)), x)
    graph.finish(out)
    x.value.zero_()
    x.value[0, 5] = value
    graph.run()
    assert out.value.isfinite().all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("eps", [1e-45, 1e-6, 1.0, 3e38])
def test_norms(graph: NativeGraph, width: int, eps: float) -> None:
    """In float64: sums of squares of 1e30 are no float32."""
    x, weight = graph.input(5, width), graph.input(1, width)
    out = graph.rms_norm(x, weight, eps)
    graph.finish(out)
    scales = torch.tensor([1.0, 1e-3, 300.0, 1e15, 0.0])[:, None]
    x.fill(scales * random(5, width))
    weight.fill(random(1, width))
    graph.run()
    mean = x.value.double().square().mean(-1, keepdim=True)
    wanted = x.value.double() * (mean + eps).rsqrt() * weight.value.double()
    torch.testing.assert_close(out.value, wanted.float(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("eps", [0.0, -1.0, 1e-50, 1e39, math.inf, math.nan])
def test_norms_refuse_what_is_no_epsilon(graph: NativeGraph, eps: float) -> None:
    with pytest.raises(BackendError, match="epsilon"):
        graph.rms_norm(graph.input(1, 8), graph.input(1, 8), eps)


def test_a_norm_of_each_head_in_a_wider_result(graph: NativeGraph) -> None:
    """As latent attention norms a part of the cache's entry."""
    entry = torch.full((4, 96), 7.0)
    x, weight = graph.input(4, 96), graph.constant(torch.ones(64))
    part = graph.view(x, x.value[:, :64])
    graph.finish(graph.rms_norm(part, weight, 1e-6, entry[:, :64]))
    x.fill(random(4, 96))
    graph.run()
    wanted = functional.rms_norm(x.value[:, :64], (64,), eps=1e-6)
    torch.testing.assert_close(entry[:, :64], wanted, rtol=1e-5, atol=1e-6)
    assert (entry[:, 64:] == 7).all()


def test_a_norm_of_no_number_is_none(graph: NativeGraph) -> None:
    x = graph.input(2, 16)
    out = graph.rms_norm(x, graph.constant(torch.ones(16)), 1e-6)
    graph.finish(out)
    x.value.fill_(1.0)
    x.value[0, 3] = math.nan
    graph.run()
    assert out.value[0].isnan().all() and out.value[1].isfinite().all()


def test_silu_far_out(graph: NativeGraph) -> None:
    x = graph.input(1, len(FAR))
    graph.finish(graph.silu(x))
    x.fill(torch.tensor([FAR]))
    graph.run()
    wanted = functional.silu(torch.tensor([FAR], dtype=torch.float64)).float()
    # Below -87 the factor stays at exp(-87), some 1e-38: nothing beside other values.
    torch.testing.assert_close(x.value, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [math.inf, 3e38, -3e38, math.nan])
def test_silu_at_the_end_of_the_range(graph: NativeGraph, value: float) -> None:
    x = graph.input(1, 20)
    graph.finish(graph.silu(x))
    x.value.fill_(value)
    graph.run()
    if math.isnan(value):
        assert x.value.isnan().all()
    elif value < 0:
        assert (x.value.abs() < 2 * abs(value) * 1.7e-38).all()
    else:
        assert (x.value == value).all()


def test_silu_near_zero(graph: NativeGraph) -> None:
    x = graph.input(1, 20001)
    graph.finish(graph.silu(x))
    values = torch.linspace(-30, 30, 20001)[None]
    x.fill(values)
    graph.run()
    torch.testing.assert_close(
        x.value, functional.silu(values.double()).float(), rtol=2e-6, atol=1e-7
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_gates(graph: NativeGraph, width: int) -> None:
    gate, up = graph.input(3, width), graph.input(3, width)
    graph.finish(graph.silu_mul(gate, up))
    values = random(3, width)
    gate.fill(values)
    up.fill(values + 1)
    graph.run()
    torch.testing.assert_close(
        gate.value, functional.silu(values) * (values + 1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_and_products_of_each_value(graph: NativeGraph, width: int) -> None:
    x, y, bias = graph.input(3, width), graph.input(3, width), graph.input(1, width)
    graph.finish(graph.add(graph.multiply(graph.add(x, y), y), bias))
    parts = random(3, width), random(3, width) + 1, random(1, width)
    for node, part in zip((x, y, bias), parts, strict=True):
        node.fill(part)
    graph.run()
    torch.testing.assert_close(x.value, (parts[0] + parts[1]) * parts[1] + parts[2])


def test_weighted_sums(graph: NativeGraph) -> None:
    values, weights = graph.input(6, 100), graph.input(1, 6)
    out = graph.weighted_sum(values, weights)
    graph.finish(out)
    values.fill(random(6, 100))
    weights.fill(random(1, 6))
    graph.run()
    torch.testing.assert_close(out.value, weights.value @ values.value)


def test_other_shapes_are_refused(graph: NativeGraph) -> None:
    x, narrow, tall = graph.input(2, 8), graph.input(2, 4), graph.input(3, 8)
    for call in (graph.silu_mul, graph.multiply, graph.add):
        for other in (narrow, tall):
            with pytest.raises(BackendError, match="fit"):
                call(x, other)
    with pytest.raises(BackendError, match="fit"):
        graph.rms_norm(x, narrow, 1e-6)
    with pytest.raises(BackendError, match="fit"):
        graph.weighted_sum(x, graph.input(1, 3))
