"""A chain takes over from the plain way once it has given the same on this device and model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from hybrimoe_plugin.decode.capture import Experts, GraphBreak, LayerGraphs
from hybrimoe_plugin.decode.chain.chain import Chain
from hybrimoe_plugin.decode.chain.link import LayerLink
from hybrimoe_plugin.decode.comparison import UNDECIDED, relative_error, tolerance
from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.errors import BackendError

log = logging.getLogger(__name__)

PROOFS = 2
"""Decode steps that run both ways and are compared; in the first the host runs ahead in any case.
"""


READ = "the model computes something from a layer's output before the next layer does"


class ChainCall(NamedTuple):
    """A layer's call of one token, as a chain needs it."""

    graphs: LayerGraphs
    call_experts: Callable[[Experts], torch.Tensor]
    link: LayerLink | None
    held: int
    """Tokens that the cache holds before the step."""
    final: bool
    """Whether the layer behind is of no chain, or somebody watches this one's output."""


class _Seen(NamedTuple):
    """A layer's call as the plain way has run it."""

    call: ChainCall
    hidden: torch.Tensor
    """Its input; a copy."""
    output: torch.Tensor
    """A copy."""
    chosen: list[int]
    entry: tuple[torch.Tensor, torch.Tensor]
    """The token's keys and values in the cache; copies."""


class ProvenChain:
    """Layers of one device that follow one another, the plain way until a chain has proved right.

        first and second step    run layer by layer, which gives the result; then as a chain
        later steps              as a chain

    A comparison that fails, or raises, leaves the plain way for good.

    Args:
        name: of the layers, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._chain = Chain()
        self._steps: list[_Seen] = []
        self._proofs = 0
        self._undecided = 0
        self._refused = False
        self._settled = False
        """Whether the outputs so far were asked for: then anyone may have read them."""
        self._links: set[LayerLink] = set()

    @property
    def _engines(self) -> set[Engine]:
        return {link.engine for link in self._links}

    @property
    def proven(self) -> bool:
        return self._proofs >= PROOFS and not self._refused

    def gave(self, hidden: torch.Tensor) -> bool:
        """Whether hidden states are the output of the layer before, as the chain gave it."""
        return hidden is self._chain.last

    def renew(self, link: LayerLink | None) -> None:
        """A layer was captured anew: prove again."""
        self.settle()
        self._proofs = self._undecided = 0
        self._steps.clear()
        if link is not None:
            self._links.add(link)

    def run(self, call: ChainCall, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output [1, 1, H] for its input; as `Chain.run` says.

        Raises:
            BackendError: something has read an output before it was right.
        """
        if self._refused:
            return _plainly(call, hidden)
        if self._proofs < PROOFS:
            return self._watch(call, hidden)
        last = self._chain.last
        if last is not None and hidden is not last:
            self._refuse(READ)
            if not self._chain.settle():
                raise BackendError(f"{self._name}: {READ}, and read what was not computed yet")
            return _plainly(call, hidden)
        return self._chain.run(call.graphs, hidden, call.link, call.final)

    def make_right(self) -> None:
        """Make every output that was given out right, for something that reads one now."""
        self._settled = True
        self._chain.make_right()

    def settle(self) -> None:
        """Make every output that was given out right, and do the bookkeeping that is left."""
        self._settled = True
        self._chain.settle()

    def recover(self) -> None:
        """Clear what an interrupted or failed pass has left; waits for the device."""
        self._chain.forget()
        self._steps.clear()
        for engine in self._engines:
            engine.recover()
        for link in self._links:
            link.recover()
        for table in {link.table for link in self._links}:
            table.forget()

    def _watch(self, call: ChainCall, hidden: torch.Tensor) -> torch.Tensor:
        """Run a layer plainly and keep what a chain must give too; compare behind the last one."""
        if self._steps and hidden is not self._steps[-1].call.graphs.output:
            if not self._settled:
                self._steps.clear()
                self._refuse(READ)
                return _plainly(call, hidden)
            self._steps.clear()  # a pass that ended early, or a layer that was called by itself
        before = hidden.clone()
        output = _plainly(call, hidden)
        chosen = [] if call.link is None else call.link.chosen(_broken(call.graphs))
        self._steps.append(
            _Seen(call, before, output.clone(), chosen, _entry(call.graphs, call.held))
        )
        self._settled = False
        if call.final:
            steps, self._steps = self._steps, []
            self._prove(steps)
        return output

    def _prove(self, steps: list[_Seen]) -> None:
        try:
            with _sure(steps, self._proofs == 0), _unseen(self._engines):
                problem = self._compare(steps)
        except Exception as raised:  # CUDA, Triton and torch raise many kinds
            problem = " ".join(str(raised).split())[:200]
            self.recover()
        for step in steps:
            _put_entry(step)
        steps[-1].call.graphs.output.copy_(steps[-1].output)
        if problem:
            self._refuse(problem)
        elif self.proven:
            log.info("%s: decode runs ahead of the host", self._name)

    def _refuse(self, problem: str) -> None:
        self._refused = True
        log.warning("%s: decode waits for the host in every layer: %s", self._name, problem)

    def _compare(self, steps: list[_Seen]) -> str:
        """Run the step as a chain; the problem, "" where there is none."""
        chain, hidden = self._chain, steps[0].hidden
        for call, *_ in steps:
            hidden = chain.run(call.graphs, hidden, call.link, call.final)
        chain.settle()
        for call, _, _, chosen, _ in steps:
            if call.link is not None and call.link.chosen(_broken(call.graphs)) != chosen:
                self._undecided += 1
                return "" if self._undecided <= UNDECIDED else "it chooses other experts"
        for step in steps:
            found = step.call.graphs.output, *_entry(step.call.graphs, step.call.held)
            right = step.output, *step.entry
            error = max(map(relative_error, found, right))
            if not error <= tolerance(step.output.dtype):
                return f"it gives something else (relative RMS {error:.2g})"
        self._undecided = 0
        self._proofs += 1
        return ""


def _plainly(call: ChainCall, hidden: torch.Tensor) -> torch.Tensor:
    return call.graphs.run(hidden, call.call_experts)


def _broken(graphs: LayerGraphs) -> GraphBreak:
    assert graphs.graph_break is not None
    return graphs.graph_break


@contextmanager
def _sure(steps: list[_Seen], ahead: bool) -> Iterator[None]:
    """While entered, every layer is launched ahead, if `ahead`."""
    links = [call.link for call, *_ in steps if call.link is not None]
    kept = [link.sure for link in links]
    if ahead:
        for link in links:
            link.sure = 0.0
    try:
        yield
    finally:
        for link, sure in zip(links, kept, strict=True):
            link.sure = sure


@contextmanager
def _unseen(engines: Iterable[Engine]) -> Iterator[None]:
    """While entered, calls are not counted, recorded or drawn: they are another's once more."""
    engines = list(engines)
    counted = [engine.controller.counters.snapshot() for engine in engines]
    watched = [(engine.recorder, engine.timeline) for engine in engines]
    for engine in engines:
        engine.recorder = engine.timeline = None
    try:
        yield
    finally:
        for engine, counters, watchers in zip(engines, counted, watched, strict=True):
            engine.controller.counters.put(counters)
            engine.recorder, engine.timeline = watchers


def _entry(graphs: LayerGraphs, held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's keys and values in the cache of a layer; copies."""
    keys, values = graphs.buffers
    return keys.narrow(2, held, 1).clone(), values.narrow(2, held, 1).clone()


def _put_entry(step: _Seen) -> None:
    for buffer, right in zip(step.call.graphs.buffers, step.entry, strict=True):
        buffer.narrow(2, step.call.held, 1).copy_(right)
