"""Which of ggml's kernels is taken, when matrices are repacked, and the team of threads."""

from __future__ import annotations

import needs
import pytest
import tiny_experts
import torch
from ggml_matrices import random_matrix
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.compute.cpu import ggml_stored
from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph, KernelSpeed, kernel_speed, library
from hybrimoe_plugin.compute.cpu.ggml.thread_team import ThreadTeam
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.repack import (
    SLOW_TYPES,
    as_q8_0,
    faster_as_q8_0,
    repacked_bytes,
)
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes

needs.kt_kernel()


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@given(st.lists(st.sampled_from(["good", "bad"]), max_size=400))
def test_a_disturbed_team_goes_home_and_comes_back(runs: list[str]) -> None:
    team = ThreadTeam()
    streak = waited = 0
    for run in runs:
        if not team.active:
            waited += 1
            team.ran_single()
            assert waited <= ThreadTeam.PAUSES[1]
            continue
        waited = 0
        team.ran_together(10_000_000 if run == "bad" else 1_000, 1_000)
        streak = streak + 1 if run == "bad" else 0
        assert team.active == (streak < ThreadTeam.STREAK)
        if not team.active:
            streak = 0


@pytest.mark.parametrize("type_name", SLOW_TYPES)
def test_repacking_changes_no_value(type_name: str) -> None:
    stored = random_matrix(type_name, 24, 96)
    packed = as_q8_0(stored)
    assert packed.nbytes == repacked_bytes(stored.shape)
    found = dequantize_bytes(packed.data, packed.type_name, packed.shape)
    wanted = dequantize_bytes(stored.data, stored.type_name, stored.shape)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("faster", [True, False])
def test_slow_types_are_repacked_only_where_that_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml_stored, "faster_as_q8_0", lambda ggml, threads, type_name: faster)
    as_stored = ["Q4_0", "Q5_0", "Q8_0"]
    for beside in (False, True):
        experts = GgmlExperts(threads=1, beside=beside)
        experts.add_layer(tiny_experts.layer(types=("Q4_0", "Q5_0", "Q8_0")))
        stored = experts._layers[0].stored
        types = [matrix.type_name for matrix in (stored.gate, stored.up, stored.down)]
        assert types == (["Q8_0"] * 3 if faster and not beside else as_stored)
        experts.close()


@pytest.mark.parametrize(("stored_ns", "packed_ns"), [(10.0, 20.0), (20.0, 10.0)])
def test_whether_repacking_pays_is_read_off_the_speed(
    ggml: Ggml, stored_ns: float, packed_ns: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"Q5_0": KernelSpeed(False, stored_ns), "Q8_0": KernelSpeed(True, packed_ns)}
    monkeypatch.setattr(Ggml, "kernel_speed", lambda _, type_name, threads: speeds[type_name])
    assert faster_as_q8_0(ggml, 2, "Q5_0") == (packed_ns < stored_ns)


@pytest.mark.parametrize(("plain_ns", "indexed_ns"), [(10, 20), (20, 10), (100, 105)])
def test_the_speed_is_that_of_the_faster_product_and_measured_once(
    ggml: Ggml, plain_ns: int, indexed_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0]
    runs: list[bool] = []

    def run(graph: Graph) -> None:
        indexed = bool(graph._counts)
        runs.append(indexed)
        clock[0] += indexed_ns if indexed else plain_ns

    forms = ggml.forms("Q8_0")
    assert forms.row and forms.indexed
    monkeypatch.setattr(Graph, "run", run)
    monkeypatch.setattr(kernel_speed, "perf_counter_ns", lambda: clock[0])
    monkeypatch.setattr(library, "_SPEEDS", {})
    speed = ggml.kernel_speed("Q8_0", 2)
    assert speed.indexed == (indexed_ns < 1.1 * plain_ns), "level counts as faster"
    rows = (64 << 20) // (4096 // 32 * 34)
    assert speed.ns == (indexed_ns if speed.indexed else plain_ns) / (rows * 4096)
    measured = len(runs)
    assert set(runs) == {True, False}
    assert ggml.kernel_speed("Q8_0", 2) is speed
    assert len(runs) == measured
    ggml.kernel_speed("Q8_0", 1)
    assert len(runs) == 2 * measured
