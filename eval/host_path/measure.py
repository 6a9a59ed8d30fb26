"""Times of layer calls: whole, to the first launch, and part by part."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter_ns, thread_time_ns
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from eval.host_path import paths
from eval.host_path.routing import LAYER_US, Case, Script
from eval.host_path.stopwatch import CALIBRATION, Stopwatch, replaced
from eval.host_path.subject import DEVICE, Subject
from hybrimoe_plugin.engine.view import HostRouting, HostView
from hybrimoe_plugin.policy.step import Rows, Scored

WHOLE = "whole call"
TOKEN = "token's mean, CPU time"
DECIDE = "routing to first launch"

ROWS = (4, 16)
ROWS_SETTLING = 8
"""Steps of all layers before the first that counts."""
ROWS_TRANSFER_US = 60.0
"""Of one expert: some misses are loaded, some computed on the CPU."""


class Times(NamedTuple):
    """Samples in us, one for each layer call that was what its case wants."""

    parts: dict[str, list[float]]
    others: int
    """Layer calls that were not: an earlier layer's prefetch had moved an expert, say."""

    def add(self, found: Mapping[str, float]) -> None:
        """Add samples by the name of their part."""
        for name, us in found.items():
            self.parts.setdefault(name, []).append(us)


Take = Callable[[float], dict[str, float]]


class Runner:
    """Drives the layers of one token after the other, as the model's own code does.

    Work between two layer calls, such as writing the next routing decision, is not timed.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._script = Script(subject)
        self._arguments = self._observed()
        self._hidden = torch.empty(1, 1, subject.engine.layers[0].spec.hidden, device=DEVICE)
        self._hidden = self._hidden.to(subject.model.dtype)

    def tokens(
        self, case: Case, count: int, take: Take, clock: Callable[[], int] = perf_counter_ns
    ) -> Times:
        """Run tokens of a case.

        Args:
            take: gives the samples of a layer call, whose whole time in us it is given.
            clock: in ns.
        """
        times = Times({}, 0)
        others = 0
        turn = self._subject.model.hybrimoe.turns.run
        with torch.no_grad():
            for _ in range(count):
                others += turn(self._token, case, take, clock, times)
        return times._replace(others=others)

    def _token(self, case: Case, take: Take, clock: Callable[[], int], times: Times) -> int:
        subject, arguments = self._subject, self._step()
        counters = subject.engine.controller.counters
        hidden = self._hidden
        others = 0
        self._script.begin(case)
        for index, layer in enumerate(subject.layers):
            self._script.arrive(index)
            before = counters.experts_cpu, counters.demand_loads
            started = clock()
            hidden = layer(hidden, **arguments)
            found = take((clock() - started) / 1e3)
            after = counters.experts_cpu, counters.demand_loads
            done = after[0] - before[0], after[1] - before[1]
            if case.every == 1 and done != (case.on_cpu, case.loads):
                others += 1
                continue
            times.add(found)
        subject.rewind()
        return others

    def _step(self) -> dict[str, Any]:
        """Arguments of the layers for a new step."""
        name = "position_embeddings"
        fresh = tuple(part.clone() for part in self._arguments[name])
        return {**self._arguments, name: fresh}

    def _observed(self) -> dict[str, Any]:
        """What the model gives its layers in a step."""
        seen: list[dict[str, Any]] = []

        def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs)

        handle = self._subject.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        self._subject.step()
        handle.remove()
        self._subject.rewind()
        return seen[0]


def whole_calls(runner: Runner, case: Case, tokens: int) -> Times:
    """Whole layer calls, with nothing watched."""
    return runner.tokens(case, tokens, lambda us: {WHOLE: us})


def token_means(runner: Runner, case: Case, tokens: int) -> Times:
    """Mean time of a layer call, for each token, where they are not alike.

    Time that the thread computes: a mean would contain the time that other programs take.
    """
    own_us = statistics.median(_two_looks_us() for _ in range(CALIBRATION))
    means = []
    spent: list[float] = []

    def take(us: float) -> dict[str, float]:
        spent.append(us - own_us)
        return {}

    for _ in range(tokens):
        spent.clear()
        runner.tokens(case, 1, take, thread_time_ns)
        means.append(statistics.mean(spent))
    return Times({TOKEN: means}, 0)


def _two_looks_us() -> float:
    started = thread_time_ns()
    return (thread_time_ns() - started) / 1e3


def decisions(subject: Subject, runner: Runner, case: Case, tokens: int) -> Times:
    """From the routing decision on the host to the first kernel or CPU task.

    Copies of demand loads are no launches here: the time that queueing them takes counts. A layer
    call in which nothing is launched by the host gives no sample.
    """
    known_ns = first_ns = 0

    def knowing(call: Callable[..., Any]) -> Callable[..., Any]:
        def known(*args: Any) -> Any:
            nonlocal known_ns
            result = call(*args)
            if not first_ns:
                known_ns = perf_counter_ns()
            return result

        return known

    def launching(call: Callable[..., Any]) -> Callable[..., Any]:
        def launches(*args: Any) -> Any:
            call(*args)
            launched()

        return launches

    def launched() -> None:
        nonlocal first_ns
        if not first_ns:
            first_ns = perf_counter_ns()

    def take(_us: float) -> dict[str, float]:
        nonlocal first_ns
        found = {DECIDE: (first_ns - known_ns) / 1e3} if first_ns else {}
        first_ns = 0
        return found

    subject.kernels.launched = subject.cpu.submitted = launched
    try:
        with (
            replaced(paths.where_routing_is_known(subject), knowing),
            replaced(paths.where_graphs_compute_misses(subject), launching),
        ):
            return runner.tokens(case, tokens, take)
    finally:
        subject.kernels.launched = subject.cpu.submitted = None


def parts(subject: Subject, runner: Runner, case: Case, tokens: int) -> Times:
    """Each part of a layer call; a part contains what it calls."""
    watch = Stopwatch()
    with watch.on(paths.watched(subject)):
        return runner.tokens(case, tokens, lambda _us: watch.take())


@contextmanager
def quiet() -> Iterator[None]:
    """Without collections of garbage, which come whenever they come."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Arrived:
    """A call's routing, which the host has read."""

    finds_slots = False

    def __init__(self, view: HostView) -> None:
        self._view = view

    def seen(self) -> HostView:
        return self._view


def few_rows(subject: Subject, rows: int, steps: int) -> list[float]:
    """Times in us of single layer calls of a few rows, one of each conversation, without graphs.

    The routing has been read already: it is the engine's call from the plan to the sum. What is
    missing is loaded or computed on the CPU, as the plan wants.
    """
    engine = subject.engine
    engine.controller.costs.transfer_us = ROWS_TRANSFER_US
    spec = engine.layers[0].spec
    random = np.random.default_rng(0)
    liked = random.normal(size=(len(engine.layers), spec.experts))
    states = torch.empty(rows, spec.hidden, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.empty(rows, spec.top_k, dtype=torch.int64, device=DEVICE)
    shares = torch.empty(rows, spec.top_k, device=DEVICE)
    conversations = Rows(np.arange(rows), np.ones(rows, bool))
    found: list[float] = []

    def step(views: list[HostView]) -> None:
        for layer, view in enumerate(views):
            sent: Any = Arrived(view)
            started = perf_counter_ns()
            engine.run(layer, states, ids, shares, sent)
            found.append((perf_counter_ns() - started) / 1e3)
            subject.clock.pass_by(LAYER_US)

    with torch.no_grad():
        for _ in range(ROWS_SETTLING + steps):
            logits = liked[:, None] + random.gumbel(size=(len(liked), rows, spec.experts))
            views = [_view(layer, spec.top_k, spec.hidden) for layer in logits]
            subject.model.hybrimoe.run_rows(conversations, step, views)
    return found[ROWS_SETTLING * len(liked) :]


def _view(logits: NDArray[np.float64], top_k: int, hidden: int) -> HostView:
    """What the host has read of a call with these logits [T, E]."""
    scores = torch.from_numpy(logits).float().softmax(1)
    weights, ids = scores.topk(top_k)
    states = torch.zeros(len(logits), hidden, dtype=torch.bfloat16)
    scored = Scored(ids.numpy(), weights.numpy(), scores.numpy())
    return HostView(HostRouting(states, ids, weights, scored), None, None)
