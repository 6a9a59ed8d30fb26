"""Recording a decoder layer's one-token call as CUDA graphs, with a graph break at the experts.

The routed experts' call goes to the engine, which plans on the host what the CPU, the accelerator
and the link do. It cannot be part of a graph, so the layer's code is cut there:

    graph 1   norm, attention over the fixed-address cache, + x, norm, router
              | copies for the host: hidden states, ids, weights, scores
    graph 2   the later layers' routers on the same hidden states    (look-ahead, if there is any)
              | copies for the host: the ids that they would choose
    engine    plans on the host, computes the routed experts         (graph 2 runs meanwhile)
              | its output is copied to a fixed address
    graph 3   shared experts, + x: what the layer's code does after the experts' call

A layer without routed experts is one graph. Which operations are before and behind the break
depends on the model's code alone; nothing of it is written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.decode_attention import AttentionKernel
from hybrimoe_plugin.compute.attention.kv_cache import Buffers, FixedCache
from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.decode.decode_state import DecodeState
from hybrimoe_plugin.device.cuda_graphs import Capture, Replay
from hybrimoe_plugin.device.streams import PendingCopy
from hybrimoe_plugin.operators.experts import HybriMoEExperts

CallLayer = Callable[[torch.Tensor, FixedCache, Any], torch.Tensor]
"""The model's own layer: (hidden states, cache, position embeddings) -> hidden states."""


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

    def needed(self) -> PendingCopy:
        return self.accelerator.pending_copy(self.on_host)

    def predicted(self) -> PendingCopy | None:
        if self.look_ahead is None:
            return None
        self.look_ahead()
        return self.accelerator.pending_copy(self.predictions_on_host)


@dataclass
class LayerGraphs:
    """The graphs of one layer and their memory."""

    buffers: Buffers
    """The KV cache that they read and write."""
    kernel: AttentionKernel
    """Their attention. Kept here, since its memory is in the graphs."""
    hidden: torch.Tensor
    """[1, 1, H]: their input."""
    before: Replay
    graph_break: GraphBreak | None
    after: Replay | None
    output: torch.Tensor
    """[1, 1, H]. Valid until the layer's next call."""

    def run(
        self, hidden: torch.Tensor, call_experts: Callable[[GraphBreak], torch.Tensor]
    ) -> torch.Tensor:
        """Replay for hidden states [1, 1, H], with the experts' call in between."""
        self.hidden.copy_(hidden)
        self.before()
        if self.graph_break is not None and self.after is not None:
            self.graph_break.output.copy_(call_experts(self.graph_break))
            self.after()
        return self.output


def record(
    state: DecodeState,
    call_layer: CallLayer,
    hidden: torch.Tensor,
    buffers: Buffers,
    experts: HybriMoEExperts | None,
    kernel: AttentionKernel,
) -> LayerGraphs:
    """Capture a layer.

    Nothing of the running step is used but shapes. The last entry of the buffers is overwritten.

    Raises:
        RuntimeError: something in the layer cannot be captured.

    Mutates: buffers, the step's inputs.
    """
    capture = state.capture
    cache = FixedCache(buffers, state.position, kernel)
    state.set_dummy_step(buffers[0].shape[2] - 1)
    with torch.inference_mode(False):
        fixed = torch.full_like(hidden, 0.25)
        experts_output = torch.zeros_like(hidden[0])
    recorder = None if experts is None else _BreakRecorder(capture, experts, experts_output)

    def call() -> torch.Tensor:
        return call_layer(fixed, cache, state.position_embeddings)

    with capture.aside():
        # First calls load kernels and make handles, which a capture must not.
        with nullcontext() if recorder is None else recorder.warming_up():
            call()
        capture.begin()
        try:
            with nullcontext() if recorder is None else recorder.capturing():
                output = call()
            last = capture.end()
        except BaseException:
            capture.abandon()
            raise
    if recorder is None or recorder.before is None:
        return LayerGraphs(buffers, kernel, fixed, last, None, None, output)
    return LayerGraphs(buffers, kernel, fixed, recorder.before, recorder.graph_break, last, output)


class _BreakRecorder:
    """Stands in for the experts while their layer is warmed up, then captured.

    Attributes:
        before: the graph that ends at the experts' call; None until it was captured.
        graph_break: the same call.
    """

    def __init__(self, capture: Capture, experts: HybriMoEExperts, output: torch.Tensor) -> None:
        assert experts.accelerator is not None, "cuda_layer() has checked it"
        self.before: Replay | None = None
        self.graph_break: GraphBreak | None = None
        self._capture = capture
        self._experts = experts
        self._output = output
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
        return self._output

    def _break(self, *inputs: torch.Tensor) -> torch.Tensor:
        """End the graph before the experts, capture look-ahead, and begin the graph behind."""
        needed = self._needed(inputs)
        _copy_to_host(needed, self._on_host)
        self.before = self._capture.end()
        look_ahead = None
        if self._later_routers:
            self._capture.begin()
            _copy_to_host(self._predicted(inputs[0]), self._predictions_on_host)
            look_ahead = self._capture.end()
        hidden, ids, weights = needed[:3]
        self.graph_break = GraphBreak(
            (hidden, ids, weights),
            self._output,
            self._accelerator,
            self._on_host,
            look_ahead,
            self._predictions_on_host,
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
