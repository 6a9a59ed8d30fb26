"""Experts of a few rows as kept graphs: against row by row, bounded, interrupted, not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import needs
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.cpu import ggml_union
from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph, KernelSpeed
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.ggml_function import KEPT_ROWS, GgmlFunction
from hybrimoe_plugin.core import Activation
from hybrimoe_plugin.policy.step import FEW_ROWS

needs.kt_kernel()

ROWS = (2, 3, 4, 8, 16, 17, 32)
TYPES = (
    ("F32",) * 3,
    ("F16",) * 3,
    ("BF16",) * 3,
    ("Q8_0",) * 3,
    ("Q4_0", "Q4_1", "Q5_0"),
    ("Q5_1", "Q8_0", "Q4_0"),
)

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def plain_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and a plain product is never the slower one."""
    monkeypatch.setattr(Ggml, "kernel_speed", lambda *_: KernelSpeed(False, 1.0))


def call_of(rows: int, top_k: int = 2, seed: int = 0) -> Call:
    """Hidden states, ids and weights of some tokens."""
    generator = torch.Generator().manual_seed(100 * seed + rows)
    ids = torch.rand(rows, 8, generator=generator).topk(top_k).indices
    hidden = torch.randn(rows, 64, generator=generator)
    return hidden, ids, torch.rand(rows, top_k, generator=generator)


def experts_of(
    types: tuple[str, str, str] = ("Q8_0",) * 3, threads: int = 1, layers: int = 1
) -> GgmlExperts:
    experts = GgmlExperts(threads)
    for seed in range(layers):
        experts.add_layer(tiny_experts.layer(types=types, seed=seed))
    return experts


def row_by_row(experts: GgmlExperts, layer: int, call: Call) -> torch.Tensor:
    hidden, ids, weights = call
    found = []
    for row in range(len(hidden)):
        part = slice(row, row + 1)
        found.append(experts.compute(layer, hidden[part], ids[part], weights[part]))
    return torch.cat(found)


def graphs_of(experts: GgmlExperts) -> int:
    return len(experts._unions._graphs)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_few_rows_are_computed_as_row_by_row(types: tuple[str, str, str], threads: int) -> None:
    """Row counts go up and down, and two layers take turns on the same graphs."""
    experts = experts_of(types, threads, layers=2)
    for seed, rows in enumerate((*ROWS, *reversed(ROWS))):
        for layer in (0, 1):
            call = call_of(rows, seed=seed)
            found = experts.compute(layer, *call)
            wanted = row_by_row(experts, layer, call)
            # Kernels of several rows may round activations in another way.
            error = float((found - wanted).norm() / wanted.norm())
            assert error < (1e-5 if types[0] == "F32" else 0.02)
    assert graphs_of(experts) == 1, "one for the 8 experts of both layers"


@pytest.mark.parametrize("rows", ROWS)
def test_choices_that_are_not_the_cpus_do_not_count(rows: int) -> None:
    experts = experts_of()
    hidden, ids, weights = call_of(rows, top_k=3)
    experts.submit(0, hidden, ids, weights, [1, 4, 6])
    found = experts.sync()
    mine = torch.isin(ids, torch.tensor([1, 4, 6]))
    wanted = row_by_row(experts, 0, (hidden, ids, weights * mine))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_other_activations_are_torchs_between_two_graphs() -> None:
    weights = tiny_experts.layer()
    spec = replace(weights.spec, activation=Activation("gelu_tanh"))
    experts = GgmlExperts(1)
    experts.add_layer(replace(weights, spec=spec))
    call = call_of(5)
    torch.testing.assert_close(experts.compute(0, *call), row_by_row(experts, 0, call))


def test_indexed_products_are_taken_where_plain_ones_are_much_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Ggml, "kernel_speed", lambda *_: KernelSpeed(True, 1.0, 3.0))
    experts = experts_of()
    few, many = call_of(4), call_of(32)
    experts.compute(0, *few)
    assert not graphs_of(experts)
    experts.compute(0, *many)  # 8 rows an expert
    assert graphs_of(experts) == 1


def test_a_row_that_is_not_finite_spoils_no_other_row_and_no_later_call() -> None:
    experts = experts_of()
    hidden, ids, weights = call_of(8)
    wanted = experts.compute(0, hidden, ids, weights)
    spoiled = hidden.clone()
    spoiled[3, 5] = math.nan
    found = experts.compute(0, spoiled, ids, weights)
    assert found[3].isnan().all()
    others = torch.arange(8) != 3
    torch.testing.assert_close(found[others], wanted[others])
    torch.testing.assert_close(experts.compute(0, hidden, ids, weights), wanted)


def test_the_call_after_an_interrupted_one_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = experts_of()
    first, second = call_of(17), call_of(3)
    wanted = experts.compute(0, *second)

    def interrupt(graph: Graph) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Graph, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            experts.compute(0, *first)
    torch.testing.assert_close(experts.compute(0, *second), wanted)


def test_graphs_of_many_experts_are_few() -> None:
    sizes = []
    places = ggml_union._LEAST_PLACES
    while places < 128:
        sizes.append(places)
        places *= 2
    assert sizes == [8, 16, 32, 64], "and one for all 128"


def test_kept_graphs_for_several_tokens_are_bounded() -> None:
    ggml = Ggml()
    function = GgmlFunction(ggml, lambda graph, x: [graph.silu(x)], threads=1)
    with torch.no_grad():
        for tokens in (1, *range(2, FEW_ROWS + 1), 100, 1, 5):
            x = torch.randn(tokens, 8)
            (y,) = function(x, tokens)
            torch.testing.assert_close(y, torch.nn.functional.silu(x))
            kept = [count for _, count in function._kept if count > 1]
            assert sum(kept) <= KEPT_ROWS
    assert kept[-1] == 5, "the last used one stays"
    assert (1, 1) in function._kept
