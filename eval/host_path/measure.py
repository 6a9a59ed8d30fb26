"""Times of layer calls: whole, to the first launch, and part by part."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch

from eval.host_path import paths
from eval.host_path.routing import Case, Script
from eval.host_path.stopwatch import Stopwatch
from eval.host_path.subject import DEVICE, Subject

WHOLE = "whole call"
DECIDE = "routing known to first launch"


class Times(NamedTuple):
    """Samples in us, one for each layer call that was what its case wants."""

    parts: dict[str, list[float]]
    others: int
    """Layer calls that were not: an earlier layer's prefetch had moved an expert, say."""


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

    def tokens(self, case: Case, count: int, take: Callable[[float], dict[str, float]]) -> Times:
        """Run tokens of a case.

        Args:
            take: gives the samples of a layer call, whose whole time in us it is given.
        """
        times = Times({}, 0)
        others = 0
        with torch.no_grad():
            for _ in range(count):
                others += self._subject.model.hybrimoe.turns.run(self._token, case, take, times)
        return times._replace(others=others)

    def _token(self, case: Case, take: Callable[[float], dict[str, float]], times: Times) -> int:
        subject, arguments = self._subject, self._step()
        counters = subject.engine.controller.counters
        others = 0
        self._script.begin(case)
        for index, layer in enumerate(subject.layers):
            self._script.arrive(index, case)
            before = counters.experts_cpu, counters.demand_loads
            started = perf_counter_ns()
            layer(self._hidden, **arguments)
            spent_us = (perf_counter_ns() - started) / 1e3
            found = take(spent_us)
            after = counters.experts_cpu, counters.demand_loads
            if (after[0] - before[0], after[1] - before[1]) != (case.on_cpu, case.loads):
                others += 1
                continue
            for name, us in found.items():
                times.parts.setdefault(name, []).append(us)
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


def decisions(subject: Subject, runner: Runner, case: Case, tokens: int) -> Times:
    """From the routing decision on the host to the first kernel or CPU task.

    Copies of demand loads are no launches here: the time that queueing them takes counts.
    """
    known_ns = first_ns = 0
    engine: Any = subject.engine
    read = engine._read

    def reading(*args: Any) -> Any:
        nonlocal known_ns
        seen = read(*args)
        known_ns = perf_counter_ns()
        return seen

    def launched() -> None:
        nonlocal first_ns
        if not first_ns:
            first_ns = perf_counter_ns()

    def take(_us: float) -> dict[str, float]:
        nonlocal first_ns
        found = {DECIDE: (first_ns - known_ns) / 1e3}
        first_ns = 0
        return found

    engine._read = reading
    subject.kernels.launched = subject.cpu.submitted = launched
    try:
        return runner.tokens(case, tokens, take)
    finally:
        del engine._read
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
