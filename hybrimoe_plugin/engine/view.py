"""What the host sees of a layer call, and how it gets there: the one synchronisation of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.device.streams import PendingCopy


class Router(Protocol):
    """What the engine asks of the model's own router; routing itself stays the model's code."""

    def scores(self) -> torch.Tensor | None:
        """[T, E] float32 scores of the running call; None where the router does not show them."""
        ...

    @property
    def predicts(self) -> bool:
        """Whether `predict` can be asked now."""
        ...

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, K] int64 ids that this router would choose for an earlier layer's hidden [T, H]."""
        ...


class Routing(NamedTuple):
    """A layer call as the model makes it, on the device of the model's dense part."""

    hidden: torch.Tensor
    """[T, H]"""
    ids: torch.Tensor
    """[T, K] integer"""
    weights: torch.Tensor
    """[T, K] floating point"""


@dataclass(frozen=True)
class CallRecord:
    """The routing of one layer call, as handed to a recorder."""

    layer: int
    topk_ids: NDArray[np.int64]
    """[T, K]"""
    topk_weights: NDArray[np.float32]
    """[T, K]"""
    scores: NDArray[np.float32] | None
    """[T, E]"""
    predicted: tuple[NDArray[np.int64], ...]
    """[T, K] ids for the next layers, nearest first."""


class Sent(Protocol):
    """What a CUDA graph copies to the host for a layer call; asked for in this order, once."""

    def needed(self) -> PendingCopy:
        """Hidden states, ids, weights, and scores where the router shows any."""
        ...

    def predicted(self) -> PendingCopy | None:
        """Ids that the later routers would choose, nearest first."""
        ...


class HostView(NamedTuple):
    """What the host must know of a layer call.

    All but the predictions is copied in one synchronisation; they arrive behind it.
    """

    hidden: torch.Tensor
    """[T, H] on the CPU, for the CPU's experts."""
    ids: torch.Tensor
    """[T, K] int64"""
    weights: torch.Tensor
    """[T, K] float32"""
    scores: NDArray[np.float32] | None
    """[T, E]"""
    predictions: PendingCopy | None
    """[T, K] ids for the next layers, nearest first; copied while the layer is planned."""

    def predicted(self, wait: bool = False) -> tuple[NDArray[np.int64], ...]:
        """The predictions, if they have arrived: all or none.

        Args:
            wait: stop the host until they have.
        """
        if self.predictions is None:
            return ()
        tensors = self.predictions.wait() if wait else self.predictions.poll()
        if tensors is None:
            return ()
        return tuple(ids.to(torch.int64).numpy() for ids in tensors)

    def record(self, layer: int, predicted: Sequence[NDArray[np.int64]]) -> CallRecord:
        """A record with copies: a CUDA graph uses the same memory again at the next token."""
        return CallRecord(
            layer,
            self.ids.numpy().copy(),
            self.weights.numpy().copy(),
            None if self.scores is None else self.scores.copy(),
            tuple(ids.copy() for ids in predicted),
        )


def view_from_accelerator(
    call: Routing, router: Router, later: Sequence[Router], accelerator: Accelerator
) -> HostView:
    """Copy the routing decision, and what else the host needs, from the device.

    Predictions are computed and copied behind it, so that it does not wait for them.

    Args:
        later: routers of the layers that are looked ahead to.
    """
    needed = accelerator.copy_to_host(_with_scores(call, router.scores()))
    predictions = None
    if later:
        predictions = accelerator.copy_to_host([other.predict(call.hidden) for other in later])
    return _view(needed.wait(), predictions)


def view_from_graph(sent: Sent) -> HostView:
    """What a CUDA graph copies to the host."""
    needed = sent.needed()
    predictions = sent.predicted()
    return _view(needed.wait(), predictions)


def view_on_cpu(call: Routing, router: Router | None) -> HostView:
    """The same without an accelerator; scores only where a router is given."""
    scores = None if router is None else router.scores()
    tensors = [tensor.to("cpu") for tensor in _with_scores(call, scores)]
    return _view(tensors, None)


def _with_scores(call: Routing, scores: torch.Tensor | None) -> list[torch.Tensor]:
    if scores is None:
        return [*call]
    return [*call, scores]


def _view(tensors: Sequence[torch.Tensor], predictions: PendingCopy | None) -> HostView:
    hidden, ids, weights, *shown = tensors
    scores = shown[0].to(torch.float32).numpy() if shown else None
    return HostView(hidden, ids.to(torch.int64), weights.to(torch.float32), scores, predictions)
