"""The team of threads: any number of them, several callers, forks, many graphs in a row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ggml_matrices import random_matrix

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels

SECONDS = 60
"""After which a test that waits for a thread fails; each takes a few at most."""


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A lost wake-up waits for ever, inside C: the default action of the alarm ends the process."""
    former = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


class Work:
    """A graph of a few operations with many chunks, and the result that it must give."""

    def __init__(self, ggml: Ggml, kernels: Kernels, threads: int, seed: int = 0) -> None:
        self.graph = NativeGraph(ggml, kernels, threads)
        self.x = self.graph.input(1, 256)
        weight = self.graph.weight(random_matrix("Q8_0", 256, 256, seed))
        inner = self.graph.silu_mul(self.graph.matmul(weight, self.x), self.x)
        self.out = self.graph.add(self.graph.matmul(weight, inner), self.x)
        self.graph.finish(self.out)
        generator = torch.Generator().manual_seed(seed)
        self.start = torch.randn(1, 256, generator=generator)
        self.wanted = self.run()

    def run(self) -> torch.Tensor:
        self.x.fill(self.start)
        self.graph.run()
        return self.out.value.clone()

    def right(self) -> bool:
        return torch.equal(self.run(), self.wanted)


@pytest.mark.parametrize("threads", [2, 3, 16, 300])
def test_any_number_of_threads_gives_the_same(ggml: Ggml, kernels: Kernels, threads: int) -> None:
    """Also more than there are cores, and than a team has."""
    alone = Work(ggml, kernels, 1)
    together = Work(ggml, kernels, threads)
    assert torch.equal(alone.wanted, together.wanted)
    assert all(together.right() for _ in range(50))


def test_numbers_of_threads_take_turns(ggml: Ggml, kernels: Kernels) -> None:
    works = [Work(ggml, kernels, threads) for threads in (2, 1, 4, 3)]
    assert all(work.right() for _ in range(100) for work in works)


def test_many_small_graphs_in_a_row(ggml: Ggml, kernels: Kernels) -> None:
    """Threads meet the ends and beginnings of graphs at every place."""
    graph = NativeGraph(ggml, kernels, 3)
    x = graph.input(4, 8)
    one = graph.constant(torch.ones(8))
    for _ in range(5):
        graph.add(x, one)
    graph.finish(x)
    x.value.zero_()
    for _ in range(10_000):
        graph.run()
    assert (x.value == 50_000).all()


def test_graphs_after_pauses_in_which_threads_fall_asleep(ggml: Ggml, kernels: Kernels) -> None:
    work = Work(ggml, kernels, 3)
    pause = threading.Event()
    for run in range(200):
        pause.wait(0.0001 * (run % 10))
        assert work.right()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_graphs_in_one_call(ggml: Ggml, kernels: Kernels, threads: int) -> None:
    """One after the other: each reads what the one before it wrote."""
    x = torch.zeros(4, 8)
    graphs = []
    for _ in range(20):
        graph = NativeGraph(ggml, kernels, threads)
        graph.finish(graph.add(graph.wrap(x), graph.constant(torch.ones(8))))
        graphs.append(graph)
    finished = [graph.finished for graph in graphs if graph.finished is not None]
    for _ in range(100):
        kernels.run(finished, threads)
    kernels.run([], threads)
    assert (x == 2000).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_graph_without_operations(ggml: Ggml, kernels: Kernels, threads: int) -> None:
    graph = NativeGraph(ggml, kernels, threads)
    graph.finish()
    for _ in range(10):
        graph.run()


def test_operations_without_chunks_are_passed(ggml: Ggml, kernels: Kernels) -> None:
    """At the beginning, in between and at the end."""
    for threads in (1, 2):
        graph = NativeGraph(ggml, kernels, threads)
        empty, x = graph.input(0, 8), graph.input(2, 8)
        graph.silu(empty)
        graph.add(x, x)
        graph.silu(empty)
        graph.silu(empty)
        graph.add(x, x)
        graph.silu(empty)
        graph.finish(x)
        x.value.fill_(1.0)
        graph.run()
        assert (x.value == 4).all()


def test_several_callers_at_once(ggml: Ggml, kernels: Kernels) -> None:
    """One has the team; the others run alone meanwhile."""
    works = [Work(ggml, kernels, 2, seed) for seed in range(4)]

    def repeat(work: Work) -> bool:
        return all(work.right() for _ in range(500))

    with ThreadPoolExecutor(len(works)) as pool:
        assert all(pool.map(repeat, works))


def test_a_team_of_a_thread_that_has_ended(ggml: Ggml, kernels: Kernels) -> None:
    works = [Work(ggml, kernels, 2, seed) for seed in range(3)]
    for work in works:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work.right).result()
        assert work.right()


def test_a_fork_has_a_team_of_its_own(ggml: Ggml, kernels: Kernels) -> None:
    """Threads do not survive a fork."""
    work = Work(ggml, kernels, 3)
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # it is not inherited
        os._exit(0 if all(work.right() for _ in range(50)) else 1)
    assert all(work.right() for _ in range(50))
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_while_another_thread_runs_graphs(ggml: Ggml, kernels: Kernels) -> None:
    busy, mine = Work(ggml, kernels, 3, 1), Work(ggml, kernels, 3, 2)
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            busy.graph.run()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(SECONDS)
                os._exit(0 if mine.right() else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ended.set()
        thread.join()


def test_a_process_ends_while_threads_wait() -> None:
    """At once, whether they look for work or sleep."""
    program = """
import torch
from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.native.choice import kernels_of
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
ggml = Ggml()
graph = NativeGraph(ggml, kernels_of(ggml), 4)
x = graph.input(64, 8)
graph.finish(graph.add(x, x))
graph.run()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=SECONDS)


def test_signals_are_for_python_s_threads(ggml: Ggml, kernels: Kernels) -> None:
    """Ctrl-C would else be taken by a thread that never looks for it."""
    work = Work(ggml, kernels, 3)
    masks = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status", encoding="utf-8") as status:
            lines = dict(line.split(":", 1) for line in status)
        masks.append(int(lines["SigBlk"], 16))
    assert work.right()
    blocking = [mask for mask in masks if mask >> (signal.SIGINT - 1) & 1]
    assert len(blocking) >= 2
