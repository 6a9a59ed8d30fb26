"""The layers of one token, computed together when the last one is called.

Between two layers Python takes longer than a small layer's arithmetic, and what it needs has left
the processor's cache meanwhile. So the layers' calls only note what is to be computed:

    call of layer    0      1      2     ...    n
    gives            o0     o1     o2           on      o0 to o(n-1) are memory to be written
    computes         -      -      -            0 1 2 ... n

That is right as long as nobody looks at o0 to o(n-1) but the next layer. Two steps are computed
layer by layer first, in which every layer must be given what the one before it gave.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.compute.cpu.native.structures import GraphOf
from hybrimoe_plugin.decode.on_cpu.native_step import NativeStep
from hybrimoe_plugin.decode.on_cpu.rope_matrix import RopeMatrix
from hybrimoe_plugin.decode.on_cpu.routed_part import RoutedPart
from hybrimoe_plugin.errors import BackendError

log = logging.getLogger(__name__)

_WATCHED_STEPS = 2
"""Steps that run layer by layer."""

READ = "the model computes something from a layer's output before the next layer does"


class _Pending(NamedTuple):
    """A layer's call that is to be computed."""

    link: ChainLink
    graph: GraphOf
    kept: GrowingLayer
    """Holds the buffers that the graph reads and writes."""
    given: torch.Tensor
    """[1, 1, H]: what the call gave, to be written."""


class LazyChain:
    """Layers that follow one another; `ChainLink` is one of them.

    Args:
        unchanged: whether the model still calls nothing but these layers, one after the other.
    """

    def __init__(self, kernels: Kernels, unchanged: Callable[[], bool]) -> None:
        self._kernels = kernels
        self._unchanged = unchanged
        self._pending: list[_Pending] = []
        self._last: torch.Tensor | None = None
        """What the layer before gave."""
        self._giver: ChainLink | None = None
        """That layer."""
        self._embeddings: Any = None
        """Of the pending calls: all graphs read one rotation."""
        self._follows = False
        """Whether each layer of the running step was given what the one before it gave."""
        self._watched = 0
        """Steps in which that was so."""
        self._defers = False
        """Whether calls of the running step may wait for the last layer's."""
        self._refused = False
        self._threads = 0

    @property
    def defers(self) -> bool:
        """Whether calls may wait for the last layer's."""
        return self._defers and not self._refused

    def enter(self, link: ChainLink, hidden: torch.Tensor, embeddings: Any) -> None:
        """A layer is called: compute what waits unless it goes on with that.

        Raises:
            BackendError: something has read an output before it was there.
        """
        if link.previous is None:
            self.settle()  # of a step that ended early
            self._follows = True
            self._defers = self._watched >= _WATCHED_STEPS and self._unchanged()
        elif hidden is not self._last or link.previous is not self._giver:
            self._follows = False
            if self._pending and hidden is not self._last:
                self._pending.clear()
                self._refuse()
                raise BackendError(f"{READ}, and read what was not computed yet")
            self.settle()
        if self._pending and embeddings is not self._embeddings:
            self.settle()

    def add(self, link: ChainLink, kept: GrowingLayer, embeddings: Any) -> torch.Tensor:
        """Note a layer's call, whose graph is prepared; gives its output, to be written."""
        finished = link.step.graph.finished
        assert finished is not None
        given = torch.empty_like(link.out)
        self._embeddings = embeddings
        self._threads = torch.get_num_threads()
        self._pending.append(_Pending(link, finished, kept, given))
        self._last, self._giver = given, link
        return given

    def waits_for(self, hidden: torch.Tensor) -> bool:
        """Whether hidden states are what the last of the waiting calls gave."""
        return bool(self._pending) and self._pending[-1].given is hidden

    def end(self) -> None:
        """The last layer was called."""
        if self._follows:
            self._watched += 1
        elif not self._defers:
            self._watched = 0

    def settle(self) -> None:
        """Compute what waits."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        self._kernels.run([call.graph for call in pending], self._threads)
        for call in pending:
            call.kept.advance()
        for call in pending:
            call.given.copy_(call.link.out)
            if call.link.routed is not None:
                call.link.routed.note()

    def forget(self) -> None:
        """Drop what an interrupted pass has left."""
        self._pending.clear()
        self._last = self._giver = self._embeddings = None

    def _refuse(self) -> None:
        self._refused = True
        log.warning("decode computes layer by layer: %s", READ)


class ChainLink:
    """A layer of a chain.

    Args:
        rope: what the graph's rotation is read from.
        routed: None for a layer without experts.
        out: [1, H], the memory that the graph writes, and the next one's reads.

    Attributes:
        out: [1, 1, H]; overwritten by the next step.
        previous: the link before it; None for the first.
        is_last: nothing of the chain comes behind.
    """

    def __init__(
        self, step: NativeStep, rope: RopeMatrix, routed: RoutedPart | None, out: torch.Tensor
    ) -> None:
        self.step = step
        self.routed = routed
        self.out = out[None]
        self.previous: ChainLink | None = None
        self.is_last = True
        self._rope = rope
        self._chain: LazyChain | None = None
        self._watchers: list[Sized] = []

    def join(self, chain: LazyChain, previous: ChainLink | None, watchers: Sequence[Sized]) -> None:
        """Become the next layer of a chain, before the first call.

        Args:
            watchers: hooks on this layer and on the next one; where there are some, outputs are
                computed at once.
        """
        self._chain = chain
        self._watchers = list(watchers)
        self.previous = previous
        if previous is not None:
            previous.is_last = False
            self.step.x = previous.out[0]

    def __call__(self, hidden: torch.Tensor, embeddings: Any, cache: Any) -> torch.Tensor | None:
        """The layer's output [1, 1, H], perhaps still to be written; None if it cannot compute it.

        Mutates: the cache, perhaps later.
        """
        chain = self._chain
        assert chain is not None, "join() comes first"
        chain.enter(self, hidden, embeddings)
        if self.routed is not None and not self.routed.applies():
            chain.settle()
            return None
        kept = self.step.prepare(hidden, cache)
        if kept is None:
            chain.settle()
            return None
        self._rope.set_step(embeddings)
        if not chain.waits_for(hidden):
            self.step.x.copy_(hidden[0])
        given = chain.add(self, kept, embeddings)
        if not chain.defers or self.is_last or any(self._watchers):
            chain.settle()
        if self.is_last:
            chain.end()
        return given

    def settle(self) -> None:
        """Compute what waits: the layer is called in another way."""
        if self._chain is not None:
            self._chain.settle()
