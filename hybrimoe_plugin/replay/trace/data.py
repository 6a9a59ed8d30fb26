"""A routing trace in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.policy.step import Rows

MAX_SIZE = 1 << 15
"""Layers, experts and top-k are stored in 16 bits."""
MAX_EXPERT_BYTES = 1 << 40


@dataclass(frozen=True)
class TraceHeader:
    """Facts about the model and the run."""

    model: str
    layers: int
    """MoE layers."""
    experts: int
    top_k: int
    expert_bytes: int
    source: str
    """Where the routing comes from: a recorded run, a public data set, or a generator with its
    parameters.
    """
    predictions: str = "none"
    """`recorded`, `modelled at recall R`, or `none`."""


class Call(NamedTuple):
    """The routing of one layer call."""

    layer: int
    """Position among the MoE layers."""
    ids: NDArray[np.int64]
    """[T, K]"""
    weights: NDArray[np.float32]
    """[T, K]"""
    scores: NDArray[np.float32] | None
    """[T, E]; only the P highest of each token are kept, the others are 0."""
    predicted: tuple[NDArray[np.int64], ...]
    """[T, K] each, for the next layers, nearest first."""
    rows: Rows | None = None
    """Whose rows these are, where several conversations or a draft's tree make a call; not kept in
    files.
    """
    accepted: NDArray[np.bool_] | None = None
    """[T] which rows of a draft's tree the pass turned out to accept; not kept in files."""


class Trace(NamedTuple):
    """A whole trace."""

    header: TraceHeader
    calls: list[Call]

    def passes(self) -> Iterator[list[Call]]:
        """Groups of calls that make one forward pass.

        A call of the same layer as the one before it, or of an earlier one, begins a new pass.
        """
        current: list[Call] = []
        for call in self.calls:
            if current and call.layer <= current[-1].layer:
                yield current
                current = []
            current.append(call)
        if current:
            yield current


def check_header(header: TraceHeader) -> None:
    """Check values that come from outside.

    Raises:
        ValueError: a size out of range, or a text that is none.
    """
    sizes = (header.layers, header.experts, header.top_k)
    in_range = all(type(size) is int and 1 <= size < MAX_SIZE for size in sizes)
    if not in_range or header.top_k > header.experts:
        raise ValueError(f"layers, experts, top_k are {sizes}")
    expert_bytes = header.expert_bytes
    if type(expert_bytes) is not int or not 1 <= expert_bytes < MAX_EXPERT_BYTES:
        raise ValueError(f"expert_bytes is {expert_bytes!r}")
    for text in (header.model, header.source, header.predictions):
        if type(text) is not str:
            raise ValueError("model, source and predictions must be texts")
