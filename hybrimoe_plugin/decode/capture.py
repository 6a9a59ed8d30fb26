"""Recording a decoder layer's step as CUDA graphs, with a graph break at the experts.

The routed experts' call goes to the engine, which plans on the host what the CPU, the accelerator
and the link do. It cannot be part of a graph, so the layer's code is cut there:

    graph 1   norm, attention over the fixed-address cache, + x, norm, router
              | copies for the host: hidden states, ids, weights, scores
    graph 2   the later layers' routers on the same hidden states    (look-ahead, if there is any)
              | copies for the host: the ids that they would choose
    engine    plans on the host, computes the routed experts         (graph 2 runs meanwhile)
              | its output is copied to a fixed address
    graph 3   shared experts, + x: what the layer's code does after the experts' call

Where a layer may be part of a chain (`decode.chain`), one more graph stands beside the engine: it
computes the routed experts from the slots that a table on the device names, as far as they lie
there. Graphs 1 and 2 then end by a mark that tells the host of their copies.

A layer without routed experts is one graph. Which operations are before and behind the break
depends on the model's code alone; nothing of it is written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hybrimoe_plugin.compute.attention.decode_attention import AttentionKernel
from hybrimoe_plugin.compute.attention.kv_cache import Buffers, FixedCache
from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.decode.decode_state import DecodeState
from hybrimoe_plugin.device.cuda_graphs import Capture, Replay
from hybrimoe_plugin.device.streams import PendingCopy
from hybrimoe_plugin.engine.view import GraphMemory, HostView, Predictions
from hybrimoe_plugin.operators.experts import HybriMoEExperts

CallLayer = Callable[[torch.Tensor, FixedCache, Any], torch.Tensor]
"""The model's own layer: (hidden states, cache, position embeddings) -> hidden states."""


class Experts(Protocol):
    """The experts' call of a replayed layer, which is the engine's `Sent` too."""

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, ids and weights, on the device."""
        ...

    def seen(self) -> HostView:
        """As `Sent` says."""
        ...

    @property
    def finds_slots(self) -> bool:
        """As `Sent` says."""
        ...

    def from_slots(self, slots: Mapping[int, int]) -> torch.Tensor:
        """As `Sent` says."""
        ...


class Link(Protocol):
    """What the graphs of a layer in a chain hold besides (`decode.chain.link`)."""

    def prepare(self) -> None:
        """Make ready for a capture: what is read meanwhile must be there."""
        ...

    def mark_routed(self) -> None:
        """Tell the host that its copies of the routing are there."""
        ...

    def mark_predicted(self) -> None:
        """The same of the later routers' choices."""
        ...

    def begin(self) -> None:
        """The device is idle behind a capture: marks count from here on."""
        ...

    def replays(self, routed: bool) -> None:
        """Graph 1, or graph 2, is about to be replayed."""
        ...

    def predictions(self, on_host: list[torch.Tensor]) -> PendingCopy:
        """The later routers' choices, which have arrived once their mark has."""
        ...

    def compute(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] the sum over the experts that lie in slots; the device's work alone."""
        ...


@dataclass
class GraphBreak:
    """The experts' call between two graphs, and what the first of them sends to the host.

    It is the engine's `Sent`. All tensors are valid until the layer's next call.
    """

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Hidden states, ids and weights, as the graph before leaves them."""
    output: torch.Tensor
    """Where the graph behind reads the experts' result."""
    accelerator: Accelerator
    on_host: list[torch.Tensor]
    """On the CPU: the inputs, and the scores where the router shows any."""
    look_ahead: Replay | None
    """Asks the later routers; it runs while the host already plans."""
    predictions_on_host: list[torch.Tensor]
    """On the CPU: the ids that they would choose."""
    link: Link | None = None
    resident: Replay | None = None
    """Computes the experts from slots, in the engine's place; leaves the result in `output`."""
    memory: GraphMemory = field(init=False)
    """`on_host` and `predictions_on_host`, as the engine wants them."""
    marked: Predictions | None = field(init=False, default=None)
    """What `memory` has of the later routers, once `link` has marked it."""

    def __post_init__(self) -> None:
        self.memory = GraphMemory(self.on_host, self.predictions_on_host)
        if self.link is not None:
            copy = self.link.predictions(self.predictions_on_host)
            self.marked = Predictions(copy, self.memory.predicted)

    def needed(self) -> PendingCopy:
        """`on_host`, as the graph before leaves it."""
        return self.accelerator.pending_copy(self.on_host)

    def seen(self) -> HostView:
        memory = self.memory
        routed = self.needed()
        predictions = None
        if self.predict():
            copy = self.accelerator.pending_copy(self.predictions_on_host)
            predictions = Predictions(copy, memory.predicted)
        routed.wait()
        return memory.view(memory.chosen() if memory.tokens == 1 else None, predictions)

    @property
    def finds_slots(self) -> bool:
        """Where the host waits in every layer, the engine computes all experts."""
        return False

    def from_slots(self, slots: Mapping[int, int]) -> torch.Tensor:
        raise AssertionError("not asked for: finds_slots is False")

    def predict(self) -> bool:
        """Ask the later routers, on the device; whether there are any."""
        if self.look_ahead is None:
            return False
        if self.link is not None:
            self.link.replays(routed=False)
        self.look_ahead()
        return True


@dataclass
class LayerGraphs:
    """The graphs of one layer and their memory."""

    buffers: Buffers
    """The KV cache that they read and write."""
    kernel: AttentionKernel
    """Their attention. Kept here, since its memory is in the graphs."""
    hidden: torch.Tensor
    """[R, 1, H]: their input. At their end their output lies there too, for the next layer."""
    before: Replay
    graph_break: GraphBreak | None
    after: Replay | None
    output: torch.Tensor
    """[R, 1, H]. Valid until the layer's next call."""

    def run(
        self, hidden: torch.Tensor, call_experts: Callable[[Experts], torch.Tensor]
    ) -> torch.Tensor:
        """Replay for hidden states [R, 1, H], with the experts' call in between."""
        self.hidden.copy_(hidden)
        self.route()
        if self.graph_break is not None and self.after is not None:
            self.graph_break.output.copy_(call_experts(self.graph_break))
            self.after()
        return self.output

    def route(self) -> None:
        """Replay up to the experts' call, or all where there is none; the input is in place."""
        if self.graph_break is not None and self.graph_break.link is not None:
            self.graph_break.link.replays(routed=True)
        self.before()


def record(
    state: DecodeState,
    call_layer: CallLayer,
    hidden: torch.Tensor,
    buffers: Buffers,
    experts: HybriMoEExperts | None,
    kernel: AttentionKernel,
    link: Link | None = None,
) -> LayerGraphs:
    """Capture a layer.

    Nothing of the running step is used but shapes. The last entry of the buffers is overwritten.

    Args:
        link: of a layer that may be part of a chain.

    Raises:
        RuntimeError: something in the layer cannot be captured.

    Mutates: buffers, the step's inputs.
    """
    capture = state.capture
    cache = FixedCache(buffers, state.position, kernel)
    state.set_dummy_step(buffers[0].shape[2] - 1)
    fixed = state.hidden_like(hidden)
    fixed.fill_(0.25)
    with torch.inference_mode(False):
        experts_output = torch.zeros_like(hidden[:, 0])
    recorder = None if experts is None else _BreakRecorder(capture, experts, experts_output, link)

    def call() -> torch.Tensor:
        return call_layer(fixed, cache, state.position_embeddings)

    if link is not None:
        link.prepare()
    with capture.aside():
        # First calls load kernels and make handles, which a capture must not.
        with nullcontext() if recorder is None else recorder.warming_up():
            call()
        capture.begin()
        try:
            with nullcontext() if recorder is None else recorder.capturing():
                output = call()
                fixed.copy_(output)
            last = capture.end()
        except BaseException:
            capture.abandon()
            raise
    if link is not None:
        link.begin()
    if recorder is None or recorder.before is None:
        return LayerGraphs(buffers, kernel, fixed, last, None, None, output)
    return LayerGraphs(buffers, kernel, fixed, recorder.before, recorder.graph_break, last, output)


class _BreakRecorder:
    """Stands in for the experts while their layer is warmed up, then captured.

    Attributes:
        before: the graph that ends at the experts' call; None until it was captured.
        graph_break: the same call.
    """

    def __init__(
        self,
        capture: Capture,
        experts: HybriMoEExperts,
        output: torch.Tensor,
        link: Link | None,
    ) -> None:
        assert experts.accelerator is not None, "cuda_layer() has checked it"
        self.before: Replay | None = None
        self.graph_break: GraphBreak | None = None
        self._capture = capture
        self._experts = experts
        self._output = output
        self._link = link
        self._accelerator = experts.accelerator
        self._router, self._later_routers = experts.routers()
        self._on_host: list[torch.Tensor] = []
        self._predictions_on_host: list[torch.Tensor] = []

    def warming_up(self) -> AbstractContextManager[None]:
        return _overridden(self._experts, self._warm_up)

    def capturing(self) -> AbstractContextManager[None]:
        return _overridden(self._experts, self._break)

    def _warm_up(self, *inputs: torch.Tensor) -> torch.Tensor:
        # Not while capturing, since this may allocate memory.
        host_memory = self._accelerator.pinned_like
        self._on_host = [host_memory(tensor) for tensor in self._needed(inputs)]
        self._predictions_on_host = [host_memory(ids) for ids in self._predicted(inputs[0])]
        if self._link is not None:
            self._link.compute(*inputs)
        return self._output

    def _break(self, *inputs: torch.Tensor) -> torch.Tensor:
        """End the graph before the experts, capture look-ahead, and begin the graph behind."""
        needed = self._needed(inputs)
        _copy_to_host(needed, self._on_host)
        link = self._link
        if link is not None:
            link.mark_routed()
        self.before = self._capture.end()
        look_ahead = resident = None
        if self._later_routers:
            self._capture.begin()
            _copy_to_host(self._predicted(inputs[0]), self._predictions_on_host)
            if link is not None:
                link.mark_predicted()
            look_ahead = self._capture.end()
        hidden, ids, weights = needed[:3]
        if link is not None:
            self._capture.begin()
            self._output.copy_(link.compute(hidden, ids, weights))
            resident = self._capture.end()
        self.graph_break = GraphBreak(
            (hidden, ids, weights),
            self._output,
            self._accelerator,
            self._on_host,
            look_ahead,
            self._predictions_on_host,
            link,
            resident,
        )
        self._capture.begin()
        return self._output

    def _needed(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the engine needs on the host."""
        scores = self._router.scores()
        return [*inputs] if scores is None else [*inputs, scores]

    def _predicted(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        return [router.predict(hidden) for router in self._later_routers]


@contextmanager
def _overridden(experts: HybriMoEExperts, call: Callable[..., torch.Tensor]) -> Iterator[None]:
    """While entered, the experts' operator calls this function in place of its engine."""
    experts.override = call
    try:
        yield
    finally:
        experts.override = None


def _copy_to_host(tensors: Sequence[torch.Tensor], on_host: Sequence[torch.Tensor]) -> None:
    for tensor, target in zip(tensors, on_host, strict=True):
        target.copy_(tensor, non_blocking=True)
