"""Recording a decoder layer's one-token call as graphs, in pieces between which the experts run,
and proving them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.compute.attention.flashinfer_choice import FlashinferKernel
from hybrimoe_plugin.compute.attention.kv_cache import FixedCache
from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.decode.shared_graphs import DecodeGraphs
from hybrimoe_plugin.device.cuda_graphs import Capture, Replay
from hybrimoe_plugin.device.streams import PendingCopy
from hybrimoe_plugin.operators.experts import HybriMoEExperts

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative RMS difference from the eager twin that is still rounding; kernels and the order of sums
differ.
"""
HALF_TOLERANCE = 0.03
"""The same for 16-bit types: the layer's own rounding is 0.003 to 0.01 there."""

Buffers = tuple[torch.Tensor, torch.Tensor]
Layer = Callable[[torch.Tensor, FixedCache, Any], torch.Tensor]
"""The model's own layer: (hidden states, cache, position embeddings) -> hidden states."""


class Difference(NamedTuple):
    """How far a replay is from its eager twin."""

    error: float
    """The largest relative RMS difference of what they leave."""
    same_choice: bool
    """Whether both chose the same experts; where two are all but tied, either may be, and weights
    say nothing.
    """


class Noted(NamedTuple):
    """What went in and out of the experts in the eager twin's run."""

    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    answer: torch.Tensor
    scores: torch.Tensor | None


@dataclass
class Break:
    """The experts' call, which runs between two pieces; also what the first piece sends to the host
    (`engine.Sent`).
    """

    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Hidden states, ids and weights, as the first piece leaves them."""
    answer: torch.Tensor
    """Where the experts' result is put for the second piece."""
    accelerator: Accelerator
    landed: list[torch.Tensor]
    """On the CPU: what was given, and the scores. Valid until the layer's next call."""
    look: Replay | None
    """Asks the later routers; runs while the host already plans."""
    foreseen: list[torch.Tensor]
    """On the CPU: what they say."""

    def needed(self) -> PendingCopy:
        return self.accelerator.pending_copy(self.landed)

    def predicted(self) -> PendingCopy | None:
        if self.look is None:
            return None
        self.look()
        return self.accelerator.pending_copy(self.foreseen)


@dataclass
class LayerGraphs:
    """One layer's pieces and their memory."""

    hidden: torch.Tensor
    before: Replay
    broken: Break | None
    after: Replay | None
    output: torch.Tensor
    """[1, 1, H]. Valid until the layer's next call."""
    kernel: FlashinferKernel | None
    """Kept: its memory is in the graphs."""

    def run(self, hidden: torch.Tensor, experts: Callable[[Break], torch.Tensor]) -> torch.Tensor:
        """Replay on the graphs' own memory, with the experts' call in between."""
        self.hidden.copy_(hidden)
        self.before()
        if self.broken is not None and self.after is not None:
            self.broken.answer.copy_(experts(self.broken))
            self.after()
        return self.output


def record(
    graphs: DecodeGraphs,
    layer: Layer,
    hidden: torch.Tensor,
    buffers: Buffers,
    experts: HybriMoEExperts | None,
    kernel: FlashinferKernel | None = None,
) -> LayerGraphs:
    """Capture a layer: one piece where there are no experts, else one before and one after them.

    Nothing of the running step is used but shapes; the last row of the buffers is overwritten.

    Raises:
        RuntimeError: something in the layer cannot be captured.

    Mutates: buffers, the step's inputs.
    """
    cache = FixedCache(buffers, graphs.place, kernel)
    graphs.scramble(buffers[0].shape[2] - 1)
    with torch.inference_mode(False):
        fixed = torch.full_like(hidden, 0.25)
        answer = torch.zeros_like(hidden[0])
    pieces: list[Replay] = []
    at_experts = None if experts is None else _AtExperts(graphs.capture, experts, answer, pieces)
    with graphs.capture.aside():
        # First calls load kernels and make handles, which a capture must not.
        with _instead(experts, None if at_experts is None else at_experts.warm_up):
            layer(fixed, cache, graphs.angles)
        graphs.capture.begin()
        try:
            with _instead(experts, None if at_experts is None else at_experts.capture):
                output = layer(fixed, cache, graphs.angles)
            pieces.append(graphs.capture.end())
        except BaseException:
            graphs.capture.abandon()
            raise
    broken = at_experts.found if at_experts is not None else None
    return LayerGraphs(
        fixed, pieces[0], broken, pieces[1] if broken is not None else None, output, kernel
    )


def difference(
    made: LayerGraphs,
    hidden: torch.Tensor,
    expected: torch.Tensor,
    noted: Noted | None,
    buffers: Buffers,
    saved: Sequence[torch.Tensor],
    held: int,
) -> Difference:
    """Replay a step that the eager twin has just run, and compare what they leave.

    Look-ahead is left out: what it predicts is advice.

    Args:
        expected: the twin's result.
        saved: the buffers as the twin left them; the replay must write row `held` anew and leave
            the others alone.

    Mutates: buffers.
    """
    restore(buffers, saved)
    for buffer in buffers:
        buffer.narrow(2, held, 1).zero_()
    output = made.run(hidden, lambda _broken: noted.answer if noted is not None else hidden[0])
    pairs, same_choice = [(output, expected), *zip(buffers, saved, strict=True)], True
    if noted is not None and made.broken is not None:
        # As it arrives on the host, so that the copies are looked at too.
        states, ids, weights, *scores = made.broken.needed().wait()
        _, right_ids, right_weights = noted.given
        same_choice = torch.equal(ids.sort().values, right_ids.cpu().sort().values)
        seen = [(states, noted.given[0])]
        if same_choice:  # sorted: of two that are all but tied either may come first
            seen.append((_sorted(weights), _sorted(right_weights)))
        if noted.scores is not None:
            seen += [(found, noted.scores) for found in scores]
        pairs += [(found, right.cpu()) for found, right in seen]
    error = max(float(_error(found, right)) for found, right in pairs if right.numel())
    return Difference(error, same_choice)


def restore(buffers: Buffers, saved: Sequence[torch.Tensor]) -> None:
    for buffer, right in zip(buffers, saved, strict=True):
        buffer.copy_(right)


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, HALF_TOLERANCE)


class _AtExperts:
    """What happens at the experts' call while its layer is warmed up, then captured."""

    def __init__(
        self, capture: Capture, experts: HybriMoEExperts, answer: torch.Tensor, pieces: list[Replay]
    ) -> None:
        self._capture, self._answer, self._pieces = capture, answer, pieces
        self._router, self._later = experts.routers()
        assert experts.accelerator is not None, "connect() looked at it"
        self._accelerator = experts.accelerator
        self._landed: list[torch.Tensor] = []
        self._foreseen: list[torch.Tensor] = []
        self.found: Break | None = None

    def warm_up(self, *given: torch.Tensor) -> torch.Tensor:
        pinned_like = self._accelerator.pinned_like  # not while capturing: it may take memory
        self._landed = [pinned_like(tensor) for tensor in self._wanted(given)]
        self._foreseen = [pinned_like(ids) for ids in self._ask(given[0])]
        return self._answer

    def capture(self, *given: torch.Tensor) -> torch.Tensor:
        wanted = self._wanted(given)
        _send(wanted, self._landed)
        self._pieces.append(self._capture.end())
        look = None
        if self._later:
            self._capture.begin()
            _send(self._ask(given[0]), self._foreseen)
            look = self._capture.end()
        self.found = Break(
            (wanted[0], wanted[1], wanted[2]),
            self._answer,
            self._accelerator,
            self._landed,
            look,
            self._foreseen,
        )
        self._capture.begin()
        return self._answer

    def _wanted(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        scores = self._router.scores()
        return [*given, *(() if scores is None else (scores,))]

    def _ask(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        return [router.predict(hidden) for router in self._later]


class _instead:  # noqa: N801 - reads as the word it is
    """While entered, the experts' operator calls this function in place of its engine."""

    def __init__(
        self, experts: HybriMoEExperts | None, call: Callable[..., torch.Tensor] | None
    ) -> None:
        self._experts, self._call = experts, call

    def __enter__(self) -> None:
        if self._experts is not None:
            self._experts.instead = self._call

    def __exit__(self, *_error: object) -> None:
        if self._experts is not None:
            self._experts.instead = None


def _send(tensors: Sequence[torch.Tensor], landed: Sequence[torch.Tensor]) -> None:
    for tensor, place in zip(tensors, landed, strict=True):
        place.copy_(tensor, non_blocking=True)


def _error(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    error: torch.Tensor = (found.float() - right.float()).norm() / right.float().norm().clamp_min(
        1e-20
    )
    return error.nan_to_num(float("inf"))


def _sorted(weights: torch.Tensor) -> torch.Tensor:
    return weights.float().sort(dim=-1).values
