"""ggml graphs: every type against the dequantised reference, experts, refusals, and the team of
threads.
"""

from __future__ import annotations

import threading

import needs
import numpy as np
import pytest
import tiny_experts
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.compute.cpu import ggml as ggml_module
from hybrimoe_plugin.compute.cpu import ggml_experts as cpu_ggml
from hybrimoe_plugin.compute.cpu.ggml import TYPES, Ggml, Graph, Pace
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.repack import SLOW_TYPES, as_q8_0, quicker_as_q8_0, repacked_bytes
from hybrimoe_plugin.compute.cpu.thread_team import Team
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

needs.kt_kernel()

SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Bytes at which a block keeps its float16 scales: random ones there could be infinite."""


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


def random_matrix(type_name: str, rows: int, columns: int, seed: int = 0) -> QuantizedMatrix:
    rng = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    if type_name in ("F32", "F16", "BF16"):
        values = torch.from_numpy(rng.standard_normal((rows, columns), dtype=np.float32))
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name]
        data = values.to(kind).view(torch.uint8).numpy().ravel()
    else:
        blocks = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
        for at in SCALES[type_name]:
            scales = rng.uniform(1e-3, 2e-3, len(blocks)).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        data = blocks.ravel()
    return QuantizedMatrix(data, type_name, (rows, columns))


@pytest.mark.parametrize("type_name", sorted(TYPES))
def test_products_of_every_type(ggml: Ggml, type_name: str) -> None:
    stored = random_matrix(type_name, 48, 512)
    weight = dequantize_bytes(stored.data, type_name, stored.shape)
    for rows, indexed in ((1, False), (1, True), (1, None), (5, None), (40, None)):
        graph = Graph(ggml, 2)
        x = graph.input(rows, 512)
        y = graph.matmul(graph.weight(stored), x, indexed=indexed)
        graph.finish(y)
        x.value.copy_(torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)))
        graph.run()
        wanted = x.value @ weight.T
        error = float((y.value - wanted).norm() / wanted.norm())
        # 8-bit activations: 0.4 to 2 %; for IQ4_XS the kernels lose more, 3 to 6 %.
        limits = {"F32": 1e-5, "F16": 0.01, "BF16": 0.01, "IQ4_XS": 0.07}
        assert error < limits.get(type_name, 0.03)


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
    graph.finish(graph.matmul(graph.weight(random_matrix("Q8_0", 32, 512)), x))
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
    torch.testing.assert_close(
        rows.value, dequantize_bytes(stored.data, "Q6_K", stored.shape)[[31, 0, 7]]
    )


@pytest.mark.parametrize("indexed", [frozenset(), frozenset({"Q4_1"}), TYPES])
@pytest.mark.parametrize("types", [("Q8_0",) * 3, ("Q4_0", "Q4_1", "Q5_0"), ("F32",) * 3])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_experts_equal_the_reference(
    types: tuple[str, str, str],
    top_k: int,
    indexed: frozenset[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Ggml, "pace", lambda _, type_name, threads: Pace(type_name in indexed, 1.0))
    weights = tiny_experts.layer(types=types, top_k=top_k)
    native, beside, plain = GgmlExperts(2), GgmlExperts(1, beside=True), TorchExperts(keep=True)
    for backend in (native, beside, plain):
        backend.add_layer(weights)
    for tokens in (1, 2, 33, 600):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.rand(tokens, 8, generator=generator).topk(top_k).indices
        hidden, routing = (
            torch.randn(tokens, 64, generator=generator),
            torch.rand(tokens, top_k, generator=generator),
        )
        for mine in (list(range(8)), [1, 2, 6]):
            wanted = _compute(plain, hidden, ids, routing, mine)
            scale = max(1e-3, float(wanted.norm()))
            for backend in (native, beside):
                found = _compute(backend, hidden, ids, routing, mine)
                assert float((found - wanted).norm()) / scale < (
                    1e-5 if types[0] == "F32" else 0.03
                )
    whole = native.compute(0, hidden, ids, routing)
    torch.testing.assert_close(whole, _compute(native, hidden, ids, routing, list(range(8))))
    beside.close()


@pytest.mark.parametrize("tokens", [1, 3, 1024])
def test_tokens_without_an_expert_of_the_cpu_s_give_zeros(tokens: int) -> None:
    """In some pieces of a long prompt nothing may be the CPU's."""
    experts = GgmlExperts(1)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    hidden, routing = torch.randn(tokens, 64), torch.ones(tokens, 2)
    ids = torch.tensor([[0, 1]]).repeat(tokens, 1)
    ids[-1, 0] = 7
    assert not _compute(experts, hidden, ids, routing, [5]).any()
    found = _compute(experts, hidden, ids, routing, [7])
    assert found[-1].any() and not found[:-1].any()


def test_experts_beside_the_caller_do_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = GgmlExperts(1, beside=True)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    go, run = threading.Event(), Graph.run
    monkeypatch.setattr(Graph, "run", lambda graph: go.wait(10) and run(graph))
    hidden, ids, routing = torch.randn(1, 64), torch.tensor([[1, 5]]), torch.tensor([[0.75, 0.25]])
    experts.submit(0, hidden, ids, routing, [1, 5])
    go.set()  # without a thread of its own `submit` would have waited for this
    torch.testing.assert_close(experts.sync(), experts.compute(0, hidden, ids, routing))
    experts.close()


def test_what_fails_beside_the_caller_is_told_at_the_end_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = GgmlExperts(1, beside=True)
    experts.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))
    hidden, ids, routing = torch.randn(1, 64), torch.tensor([[1, 5]]), torch.tensor([[0.75, 0.25]])
    with pytest.raises(BackendError):
        experts.submit(0, hidden, ids + 8, routing, [1, 5])

    another = GgmlExperts(1, beside=True)
    another.add_layer(tiny_experts.layer(types=("Q8_0",) * 3))

    def fail(_graph: Graph) -> None:
        raise BackendError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Graph, "run", fail)
        experts.submit(0, hidden, ids, routing, [1, 5])
        with pytest.raises(BackendError, match="broken"):
            experts.sync()
        another.submit(0, hidden, ids, routing, [1, 5])
        another.close()  # nobody waits for the failed call any more
    experts.submit(0, hidden, ids, routing, [1, 5])
    torch.testing.assert_close(experts.sync(), experts.compute(0, hidden, ids, routing))
    experts.close()


@pytest.mark.parametrize("types", [("Q8_0",) * 3, ("Q4_0", "Q4_1", "Q5_0")])
def test_both_ways_through_many_tokens_are_the_same_function(
    ggml: Ggml, types: tuple[str, str, str]
) -> None:
    weights = tiny_experts.layer(types=types, top_k=2)
    stored = cpu_ggml._Layer(ggml, 2, weights, repack=False)._stored
    generator = torch.Generator().manual_seed(0)
    for tokens, experts in (
        (1, 8),
        (5, 8),
        (64, 8),
        (64, 3),
        (7, 2),
    ):  # also such as leave experts without rows
        ids = torch.rand(tokens, experts, generator=generator).topk(2).indices + (8 - experts)
        hidden, routing = (torch.randn(tokens, size, generator=generator) for size in (64, 2))
        one, other = (
            way(ggml, 2, stored, hidden, ids, routing)
            for way in (cpu_ggml._by_index, cpu_ggml._by_expert)
        )
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(one.abs().max()))


def _compute(
    backend: GgmlExperts | TorchExperts,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    routing: torch.Tensor,
    mine: list[int],
) -> torch.Tensor:
    backend.submit(0, hidden, ids, routing, mine)
    return backend.sync()


def test_what_the_kernels_must_not_see_is_refused(ggml: Ggml) -> None:
    good = random_matrix("Q8_0", 8, 64)
    for bad in (
        good._replace(type_name="TQ1_0"),
        good._replace(shape=(8, 96)),
        good._replace(data=good.data[:-1]),
        good._replace(data=np.repeat(good.data, 2)[::2]),
    ):
        with pytest.raises(BackendError):
            Graph(ggml, 1).weight(bad)
    experts = GgmlExperts(1)
    experts.add_layer(tiny_experts.layer())
    hidden, routing = torch.zeros(2, 64), torch.ones(2, 2)
    twice = torch.tensor([[0, 1], [3, 3]])
    for ids in (
        torch.full((2, 2), 8),
        torch.full((2, 2), -1),
        torch.zeros(3, 2, dtype=torch.int64),
        twice,
    ):
        with pytest.raises(BackendError):
            experts.compute(0, hidden, ids, routing)
    with pytest.raises(BackendError):
        experts.compute(0, torch.zeros(2, 32), torch.zeros(2, 2, dtype=torch.int64), routing)


def test_parts_of_a_buffer_are_read_and_written_in_place(ggml: Ggml) -> None:
    """Strided views in, a sum and a norm into places of the caller's."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(6, 32, generator=generator), torch.randn(32, generator=generator)
    out = torch.zeros(1, 40)
    graph = Graph(ggml, 2)
    x = graph.input(1, 4 * 48)
    tails = graph.view(x, x.value.view(4, 48)[:, None, 16:])  # [4, 1, 32]
    stored = QuantizedMatrix(weight.numpy().view(np.uint8).reshape(-1), "F32", (6, 32))
    rows = graph.matmul(graph.weight(stored), tails)
    plus = graph.add(rows, graph.constant(torch.arange(6)))
    normed = graph.rms_norm(
        graph.view(x, x.value[:, 48:80]), graph.constant(scale), 1e-6, out[:, 8:]
    )
    graph.finish(plus, normed)
    given = torch.randn(1, 4 * 48, generator=generator)
    x.fill(given)
    graph.run()
    wanted = given.view(4, 48)[:, None, 16:] @ weight.T + torch.arange(6)
    torch.testing.assert_close(plus.value, wanted)
    torch.testing.assert_close(
        out[:, 8:], torch.nn.functional.rms_norm(given[:, 48:80], (32,), scale, 1e-6)
    )
    assert not out[:, :8].any() and torch.equal(x.value, given)


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


@given(st.lists(st.sampled_from(["good", "bad"]), max_size=400))
def test_a_disturbed_team_goes_home_and_comes_back(runs: list[str]) -> None:
    team, streak, waited = Team(), 0, 0
    for run in runs:
        if not team.together:
            waited += 1
            team.ran_alone()
            assert waited <= Team.PAUSES[1]
            continue
        waited = 0
        team.ran_together(10_000_000 if run == "bad" else 1_000, 1_000)
        streak = streak + 1 if run == "bad" else 0
        assert team.together == (streak < Team.STREAK)
        if not team.together:
            streak = 0


@pytest.mark.parametrize("type_name", SLOW_TYPES)
def test_repacking_changes_no_value(type_name: str) -> None:
    stored = random_matrix(type_name, 24, 96)
    packed = as_q8_0(stored)
    assert packed.nbytes == repacked_bytes(stored)
    found, wanted = (
        dequantize_bytes(item.data, item.type_name, item.shape) for item in (packed, stored)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("quicker", [True, False])
def test_slow_types_are_repacked_only_where_that_is_quicker(
    quicker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_ggml, "quicker_as_q8_0", lambda ggml, threads, type_name: quicker)
    for beside in (False, True):
        experts = GgmlExperts(threads=1, beside=beside)
        experts.add_layer(tiny_experts.layer(types=("Q4_0", "Q5_0", "Q8_0")))
        types = [stored.type_name for stored in experts._layers[0]._stored]
        assert types == (["Q8_0"] * 3 if quicker and not beside else ["Q4_0", "Q5_0", "Q8_0"])
        experts.close()


@pytest.mark.parametrize(("stored_ns", "packed_ns"), [(10.0, 20.0), (20.0, 10.0)])
def test_whether_repacking_pays_is_read_off_the_pace(
    ggml: Ggml, stored_ns: float, packed_ns: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces = {"Q5_0": Pace(False, stored_ns), "Q8_0": Pace(True, packed_ns)}
    monkeypatch.setattr(Ggml, "pace", lambda _, type_name, threads: paces[type_name])
    assert quicker_as_q8_0(ggml, 2, "Q5_0") == (packed_ns < stored_ns)


@pytest.mark.parametrize(("plain_ns", "indexed_ns"), [(10, 20), (20, 10), (100, 105)])
def test_the_pace_is_that_of_the_quicker_product_and_measured_once(
    ggml: Ggml, plain_ns: int, indexed_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, runs = [0], list[bool]()

    def run(graph: Graph) -> None:
        runs.append(graph._first is not None)
        clock[0] += indexed_ns if runs[-1] else plain_ns

    monkeypatch.setattr(Graph, "run", run)
    monkeypatch.setattr(ggml_module, "perf_counter_ns", lambda: clock[0])
    monkeypatch.setattr(ggml_module, "_PACES", {})
    pace = ggml.pace("Q8_0", 2)
    assert pace.indexed == (indexed_ns < 1.1 * plain_ns), "level counts as quicker"
    rows = (64 << 20) // (4096 // 32 * 34)
    assert pace.ns == (indexed_ns if pace.indexed else plain_ns) / (rows * 4096)
    measured = len(runs)
    assert set(runs) == {True, False}
    assert Ggml.pace(ggml, "Q8_0", 2) is pace and len(runs) == measured
    ggml.pace("Q8_0", 1)
    assert len(runs) == 2 * measured


def test_a_host_s_default_dtype_does_not_reach_the_buffers() -> None:
    """Classic kTransformers makes bfloat16 the default while it loads and runs; graphs read float32
    at a pointer.
    """
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    hidden, ids, routing = torch.randn(1, 64), torch.tensor([[1, 5]]), torch.tensor([[0.75, 0.25]])
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            backend = GgmlExperts(1)
            backend.add_layer(weights)
            outputs.append(backend.compute(0, hidden, ids, routing))
        finally:
            torch.set_default_dtype(before)
    torch.testing.assert_close(*outputs)
