"""`cpu_backend: ggml` is ggml's own graphs; `auto` is the compiled operations where they are."""

from __future__ import annotations

from collections.abc import Sequence

import needs
import pytest
import tiny_experts
import torch
from ggml_matrices import random_matrix

from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.compute.cpu.native import choice, kernels
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph, NativeGraph
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine.cpu_choice import cpu_backends, make_cpu
from hybrimoe_plugin.operators.dense import shared_kernels, stored_kernels

needs.kt_kernel()
needs.operations()


def backends(setting: str, alone: bool) -> tuple[str, ...]:
    layers = [tiny_experts.layer(types=("Q8_0",) * 3)]
    return cpu_backends(Settings(cpu_backend=setting), layers, alone)


def test_operations_are_taken_unless_ggml_is_asked_for() -> None:
    assert backends("auto", alone=True) == ("operations",)
    assert "operations" in backends("auto", alone=False)
    assert backends("ggml", alone=True) == backends("ggml", alone=False) == ("ggml",)


def test_without_them_ggml_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "operations", None)
    assert backends("auto", alone=True) == ("ggml",)
    assert GgmlExperts(1).name == "ggml"


@pytest.mark.parametrize("setting", ["auto", "ggml", "kt", "torch"])
def test_the_dense_part_follows_the_setting(setting: str) -> None:
    settings = Settings(cpu_backend=setting, dense="quantised")
    made = stored_kernels(None, settings, "cpu", "cpu")
    assert made is not None and made.operations is (setting != "ggml")


@pytest.mark.parametrize("backend", ["operations", "ggml"])
def test_a_backend_has_the_name_that_it_was_made_by(backend: str) -> None:
    """Profiles are stored under it, and engines share what has the same."""
    assert make_cpu(backend, 1).name == backend


def test_ggml_has_no_operations() -> None:
    ggml = shared_kernels(None, Settings(cpu_backend="ggml"))
    assert choice.kernels_of(ggml) is None
    assert choice.kernels_of(shared_kernels(None, Settings())) is not None


@pytest.mark.parametrize(
    ("rows", "matrices", "kind"),
    [
        (1, [("F16", 256)], NativeGraph),
        (40, [("Q8_0", 256)], NativeGraph),
        (40, [("BF16", 256)], NativeGraph),
        (40, [("F16", 256)], Graph),
        (40, [("F32", 256), ("Q8_0", 256)], Graph),
        (40, [("F32", 8), ("Q8_0", 256)], NativeGraph),  # a router beside an MLP
        (4, [("Q8_0", 256)], Graph),
    ],
)
def test_many_rows_go_where_most_are_fast(
    rows: int, matrices: Sequence[tuple[str, int]], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles do not take F16 and F32, for which ggml has tiles of its own."""
    ggml = Ggml()
    found = choice.kernels_of(ggml)
    assert found is not None
    if not found.tiles:
        pytest.skip("this processor has no tiles")
    stored = [random_matrix(name, count, 256) for name, count in matrices]
    assert all(ggml.computes(name) for name, _ in matrices)  # tried before graphs do nothing
    ran: set[type] = set()
    for each in (Graph, NativeGraph):
        monkeypatch.setattr(each, "run", lambda graph: ran.add(type(graph)))

    def build(graph: AnyGraph, x: object) -> list[object]:
        return [graph.matmul(graph.weight(each), x) for each in stored]  # type: ignore[arg-type]

    GgmlFunction(ggml, build)(torch.zeros(rows, 256), rows)  # type: ignore[arg-type]
    assert ran == {kind}
