"""What the host sees of a layer call, and how it gets there: the one synchronisation of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.backends import Accelerator
from hybrimoe_plugin.device.streams import PendingCopy
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.policy.step import Rows, Scored, loads


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


class HostRouting(NamedTuple):
    """A routing decision on the host: tensors for the CPU's experts, arrays for the policies.

    The arrays are views of the tensors.
    """

    hidden: torch.Tensor
    """[T, H] on the CPU."""
    ids: torch.Tensor
    """[T, K] int64"""
    weights: torch.Tensor
    """[T, K] float32"""
    scored: Scored
    """Ids and weights as arrays, and the scores where the router shows any."""


class Predictions:
    """What the later routers would choose, on its way to the host while the layer is planned.

    Args:
        copy: [T, K] integer ids for each of the next layers, nearest first.
        arrays: the same memory as int64 arrays; None where these are to be made once it arrived.
    """

    def __init__(self, copy: PendingCopy, arrays: tuple[NDArray[np.int64], ...] | None = None):
        self._copy = copy
        self._arrays = arrays

    def arrived(self, wait: bool = False) -> tuple[NDArray[np.int64], ...]:
        """The ids [T, K] for the next layers, if they have arrived: all or none.

        Args:
            wait: stop the host until they have.
        """
        tensors = self._copy.wait() if wait else self._copy.poll()
        if tensors is None:
            return ()
        if self._arrays is not None:
            return self._arrays
        return tuple([ids.to(torch.int64).numpy() for ids in tensors])


def loads_of_each(predicted: Sequence[NDArray[np.int64]]) -> list[dict[int, int]]:
    """Expert -> number of tokens that are predicted to choose it, for each ids [T, K]."""
    if predicted and len(predicted[0]) == 1:  # as `loads` does it, without its calls
        return [dict.fromkeys(ids.tolist()[0], 1) for ids in predicted]
    return [loads(ids) for ids in predicted]


def own_rows(rows: Rows) -> Rows:
    """A copy, which its caller cannot change while it is kept.

    Raises:
        InputError: no `Rows`, or of other kinds of values.
    """
    if not isinstance(rows, Rows):
        raise InputError(f"rows: expected Rows(owners, sure), found {type(rows).__name__}")
    owners = _array("owners", rows.owners)
    if owners.size and owners.dtype.kind not in "biuf":
        raise InputError(f"rows: owners must be numbers, found {owners.dtype}")
    return Rows(owners, truth_values("rows: sure", rows.sure))


def truth_values(name: str, values: object) -> NDArray[np.bool_]:
    """A copy as an array. Raises: InputError: anything but truth values."""
    found = _array(name, values)
    if found.size and found.dtype != np.bool_:
        raise InputError(f"{name}: expected truth values, found {found.dtype}")
    return found.astype(np.bool_)


def _array(name: str, values: Any) -> NDArray[Any]:
    try:
        return np.array(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; a tensor on a device
        raise InputError(f"{name}: no array: {error}") from error


def check_rows(rows: Rows, tokens: int) -> None:
    """Check that a call's rows are described one by one.

    Args:
        tokens: T of the call.

    Raises:
        InputError: `rows` is of more rows than T, or of fewer.
    """
    owners, sure = rows.owners.shape, rows.sure.shape
    if owners != (tokens,) or sure != (tokens,):
        raise InputError(
            f"rows: a call of {tokens} rows needs as many owners and truth values, found "
            f"{list(owners)} and {list(sure)}"
        )


class HostView(NamedTuple):
    """What the host must know of a layer call.

    All but the predictions is copied in one synchronisation; they arrive behind it.
    """

    routing: HostRouting
    chosen: list[int] | None
    """[K] the experts of a call of one token, where they are known already."""
    predictions: Predictions | None
    weights_as_sent: torch.Tensor | None = None
    """What `routing.weights` is yet to be made from; None where it is there already."""

    def for_cpu(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, ids and weights for the CPU's experts."""
        hidden, ids, weights, _ = self.routing
        if self.weights_as_sent is not None:
            weights.copy_(self.weights_as_sent)
        return hidden, ids, weights

    def scored(self, rows: Rows | None) -> Scored:
        """What the cache learns from.

        Args:
            rows: of a pass that several conversations share, or that verifies a draft's tree.
        """
        scored = self.routing.scored
        return scored if rows is None else scored._replace(rows=rows)

    def loads(self) -> dict[int, int]:
        """Expert -> number of tokens that chose it."""
        if self.chosen is not None:
            return dict.fromkeys(self.chosen, 1)
        return loads(self.routing.scored.ids)

    def record(self, layer: int, predicted: Sequence[NDArray[np.int64]]) -> CallRecord:
        """A record with copies: a CUDA graph uses the same memory again at the next token."""
        self.for_cpu()
        ids, weights, scores, _ = self.routing.scored
        return CallRecord(
            layer,
            ids.copy(),
            weights.copy(),
            None if scores is None else scores.copy(),
            tuple(ids.copy() for ids in predicted),
        )


class Sent(Protocol):
    """What a CUDA graph copies to the host for a layer call."""

    def seen(self) -> HostView:
        """What it has copied, once that is there; asked for once in a call.

        Valid until the graph's next replay, which writes to the same memory.
        """
        ...

    @property
    def finds_slots(self) -> bool:
        """Whether `from_slots` can be called: not once the cache has shrunk in this call."""
        ...

    def from_slots(self, slots: Mapping[int, int]) -> torch.Tensor:
        """Compute experts of the call by a graph, behind the arrival of their bytes.

        Args:
            slots: expert -> slot of those that it is to compute.

        Returns:
            [T, H] their weighted sum.
        """
        ...


class GraphMemory:
    """The host's memory that the graphs of one layer copy each step's routing to.

    It never moves, so the tensors and arrays that are views of it are made once. What has another
    dtype than the host wants is converted for each step, into memory that does not move either.
    Where scores are shown, no cache looks at the weights: they are converted when the CPU needs
    them.

    Args:
        tensors: hidden states [T, H], ids and weights [T, K], and scores [T, E] where the router
            shows any; of any integer and floating point dtypes.
        predicted: [T, K] ids that the later routers would choose, nearest first.

    Attributes:
        tokens: T, one for each sequence.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], predicted: Sequence[torch.Tensor]) -> None:
        hidden, ids, *floating = tensors
        self.tokens = len(ids)
        self._chosen = ids[0].numpy()
        self._conversions: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(target, source) of what has another dtype."""
        found = [self._as(ids, torch.int64)]
        found += [self._as(part, torch.float32) for part in floating]
        self._routing = _routing([hidden, *found])
        weights, *scores = floating
        self._weights: torch.Tensor | None = None
        """As the graph leaves them, where they are converted when somebody asks."""
        if scores and weights.dtype != torch.float32:
            self._weights = weights
            self._conversions = [pair for pair in self._conversions if pair[1] is not weights]
        self.predicted: tuple[NDArray[np.int64], ...] | None = None
        """[T, K] for each of the next layers; None where they have another dtype."""
        if all(ids.dtype == torch.int64 for ids in predicted):
            self.predicted = tuple(ids.numpy() for ids in predicted)

    def chosen(self) -> list[int]:
        """[K] the first token's experts, as they are there now."""
        experts: list[int] = self._chosen.tolist()
        return experts

    def view(self, chosen: list[int] | None, predictions: Predictions | None) -> HostView:
        """What is there now; valid until the next step.

        Args:
            chosen: as `chosen()` gave it; None where there are several tokens.
        """
        for target, source in self._conversions:
            target.copy_(source)
        return HostView(self._routing, chosen, predictions, self._weights)

    def _as(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, or what it is converted into."""
        if tensor.dtype == dtype:
            return tensor
        with torch.inference_mode(False):
            target = torch.empty(tensor.shape, dtype=dtype)
        self._conversions.append((target, tensor))
        return target


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
        asked = [other.predict(call.hidden) for other in later]
        predictions = Predictions(accelerator.copy_to_host(asked))
    return HostView(_routing(needed.wait()), None, predictions)


def view_on_cpu(call: Routing, router: Router | None) -> HostView:
    """The same without an accelerator; scores only where a router is given."""
    scores = None if router is None else router.scores()
    tensors = [tensor.to("cpu") for tensor in _with_scores(call, scores)]
    return HostView(_routing(tensors), None, None)


def _with_scores(call: Routing, scores: torch.Tensor | None) -> list[torch.Tensor]:
    if scores is None:
        return [*call]
    return [*call, scores]


def _routing(tensors: Sequence[torch.Tensor]) -> HostRouting:
    """Of what lies on the host: hidden states, ids, weights, and scores if there are any."""
    hidden, ids, weights, *shown = tensors
    ids, weights = ids.to(torch.int64), weights.to(torch.float32)
    # Policies read numbers alone: gradients are between the model and the CPU's experts.
    scores = shown[0].detach().to(torch.float32).numpy() if shown else None
    scored = Scored(ids.numpy(), weights.detach().numpy(), scores)
    return HostRouting(hidden, ids, weights, scored)
