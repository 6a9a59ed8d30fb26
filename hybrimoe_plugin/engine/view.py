"""What the host sees of a layer call, and how it gets there: the one synchronisation of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.device.streams import Coming


class Router(Protocol):
    """What the engine may ask of the model's own router; the routing itself stays the
    model's code.
    """

    def scores(self) -> torch.Tensor | None:
        """[T, E] float32 scores of the running call, None where the host does not show them."""
        ...

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, K] int64 ids that this router would choose for hidden states [T, H] of an earlier
        layer.
        """
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
    """What a CUDA graph sends to the host of a layer call; asked for in this order, once."""

    def needed(self) -> Coming:
        """Hidden states, ids, weights, and scores where the router shows any."""
        ...

    def predicted(self) -> Coming | None:
        """Ids that the later routers would choose, nearest first."""
        ...


class HostView(NamedTuple):
    """What the host must know of a layer call; brought over in one synchronisation, predictions
    behind it.
    """

    hidden: torch.Tensor
    """[T, H] on the CPU, for the CPU's experts."""
    ids: torch.Tensor
    """[T, K] int64"""
    weights: torch.Tensor
    """[T, K] float32"""
    scores: NDArray[np.float32] | None
    """[T, E]"""
    coming: Coming | None
    """[T, K] ids for the next layers, nearest first; on their way while the layer is planned."""

    def predicted(self, wait: bool = False) -> tuple[NDArray[np.int64], ...]:
        """The predictions that have arrived: all or none. Stops the host only where asked to."""
        if self.coming is None:
            return ()
        tensors = self.coming.wait() if wait else self.coming.now()
        return tuple(found.to(torch.int64).numpy() for found in tensors or ())

    def record(self, layer: int, predicted: Sequence[NDArray[np.int64]]) -> CallRecord:
        """Copies: what a CUDA graph sends lies in the same memory at the next token."""
        scores = None if self.scores is None else self.scores.copy()
        ids, weights = self.ids.numpy().copy(), self.weights.numpy().copy()
        return CallRecord(layer, ids, weights, scores, tuple(one.copy() for one in predicted))


def bring(
    call: Routing, router: Router, later: Sequence[Router], accelerator: Accelerator
) -> HostView:
    """Bring over the routing decision and what else the host needs.

    Predictions are computed behind it, so that it does not wait for them.

    Args:
        later: routers of the layers that are looked ahead to.
    """
    shown = router.scores()
    needed = accelerator.bring([*call, *(() if shown is None else (shown,))])
    coming = accelerator.bring([other.predict(call.hidden) for other in later]) if later else None
    return _view(needed.wait(), coming)


def take(sent: Sent) -> HostView:
    """What a CUDA graph brings over."""
    needed, coming = sent.needed(), sent.predicted()
    return _view(needed.wait(), coming)


def here(call: Routing, router: Router | None) -> HostView:
    """The same without an accelerator; scores only where a router is given."""
    shown = router.scores() if router is not None else None
    return _view(
        [tensor.to("cpu") for tensor in (*call, *(() if shown is None else (shown,)))], None
    )


def _view(tensors: Sequence[torch.Tensor], coming: Coming | None) -> HostView:
    states, ids, weights, *scores = tensors
    return HostView(
        states,
        ids.to(torch.int64),
        weights.to(torch.float32),
        scores[0].to(torch.float32).numpy() if scores else None,
        coming,
    )
