"""Which layers an accelerator computes, by measured costs (paper 2c: execution mapping).

Pure: no torch, no devices. A pass is three queues: reads from flash in the order of layers, copies
over the link, and computing, where each layer needs the one before. Each bar is a layer:

    flash     |-- 0 --|-- 1 --|-- 2 --|-- 3 --|           reads go on with the next pass
    link              |0|             |2|                 0 and 2 are copied to the accelerator
    compute             |0 GPU|- 1 CPU -|2 GPU|- 3 CPU -|

The pass is as long as its longest queue, here the reads, plus what cannot overlap at its ends. A
layer's buffer is read into again when the layer was computed on the CPU or copied away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

MARGIN = 0.02
"""Share of a pass that the accelerator must be predicted to save, or everything stays on the CPU.
"""
PASSES = 3
"""Simulated passes; the last one's length counts, when buffers are as full as they stay."""
LEAST_GAIN = 1e-3
"""Share of a pass that a change of sides must save."""


class Place(Enum):
    """Where a layer computes, and where its weights wait."""

    CPU = "cpu"
    """On the CPU, from DRAM or as they arrive from flash."""
    COPIED = "copied"
    """On the accelerator; sent there for every pass, while the layers before compute."""
    STAYS = "stays"
    """On the accelerator, whose memory keeps them."""


@dataclass(frozen=True)
class LayerCosts:
    """Microseconds that were measured for a layer of one shape and a tree of one size."""

    read_us: float
    """From flash; 0 for layers in DRAM."""
    copy_us: float
    """From DRAM to the accelerator."""
    cpu_us: float
    """Computed on the CPU."""
    device_us: float
    """Computed on the accelerator."""

    def in_dram(self) -> LayerCosts:
        return replace(self, read_us=0.0)


@dataclass(frozen=True)
class Rings:
    """Buffers, and the cost of changing sides."""

    host: int
    """DRAM buffers that streamed layers pass through."""
    device: int
    """Accelerator buffers that copied layers pass through."""
    hop_us: float
    """To take hidden states over the link, one way."""


@dataclass(frozen=True)
class Split:
    """A placement of all layers and what is expected of it."""

    places: tuple[Place, ...]
    pass_us: float
    cpu_us: float
    """Predicted pass with everything on the CPU and the same DRAM."""
    head: bool = False
    """Whether the output head is on the accelerator too."""
    experts: bool = False
    """Whether routed experts are sent to the accelerator when they are chosen."""

    @property
    def stays(self) -> int:
        """Layers that live on the accelerator: the first ones."""
        return sum(place is Place.STAYS for place in self.places)

    def line(self, device: str) -> str:
        """For people; times are predicted by the measured model."""
        copied = sum(place is Place.COPIED for place in self.places)
        on_cpu = len(self.places) - self.stays - copied
        head = ", output head there" if self.head else ""
        experts = ", experts sent there" if self.experts else ""
        return (
            f"{device}: of {len(self.places)} layers {self.stays} live there, {copied} are copied "
            f"there for each pass, {on_cpu} compute on the CPU{head}{experts}; predicted "
            f"{self.pass_us / 1e3:.1f} ms a pass, {self.cpu_us / 1e3:.1f} ms on the CPU alone"
        )


def pass_us(layers: Sequence[LayerCosts], places: Sequence[Place], rings: Rings) -> float:
    """Length of a pass once passes follow one another.

    Args:
        layers: costs, in the order of execution.
        places: of the same layers.
        rings: buffers, and the cost of changing sides.
    """
    queues = _Queues(rings)
    before = 0.0
    for _ in range(PASSES):
        before = queues.computed
        for cost, place in zip(layers, places, strict=True):
            queues.add(cost, place)
        queues.return_to_cpu()
    return queues.computed - before


class _Queues:
    """When each queue has done what it was given so far, in microseconds."""

    def __init__(self, rings: Rings) -> None:
        self.computed = 0.0
        self._rings = rings
        self._read = 0.0
        self._copied = 0.0
        self._on_device = False
        """Whether the hidden states are on the accelerator."""
        self._host_free = [0.0] * rings.host
        """When each host buffer became free; the last ones are those of the ring."""
        self._device_free = [0.0] * rings.device
        """The same for device buffers."""

    def add(self, cost: LayerCosts, place: Place) -> None:
        """Read, copy and compute one layer. Mutates."""
        streamed = cost.read_us > 0 and place is not Place.STAYS
        copied = place is Place.COPIED
        on_device = place is not Place.CPU
        ready = 0.0
        if streamed:
            begin = max(self._read, self._host_free[-self._rings.host])
            self._read = ready = begin + cost.read_us
        if copied:
            begin = max(self._copied, ready, self._device_free[-self._rings.device])
            self._copied = ready = begin + cost.copy_us
        hop = self._rings.hop_us if on_device != self._on_device else 0.0
        begin = max(self.computed + hop, ready)
        self.computed = begin + (cost.device_us if on_device else cost.cpu_us)
        self._on_device = on_device
        if streamed:
            self._host_free.append(self._copied if copied else self.computed)
        if copied:
            self._device_free.append(self.computed)

    def return_to_cpu(self) -> None:
        """Take the hidden states back at the end of a pass. Mutates."""
        if self._on_device:
            self.computed += self._rings.hop_us
        self._on_device = False


def choose_places(layers: Sequence[LayerCosts], stays: int, rings: Rings) -> Split:
    """The best places found for the layers after the first `stays`, which live on the accelerator.

    From everything on the CPU, and from everything on the accelerator, single layers and whole
    tails change sides while that makes the pass shorter.
    """
    kept = [Place.STAYS] * stays
    count = len(layers) - stays
    found = []
    for start in (Place.CPU, Place.COPIED):
        places = [*kept, *[start] * count]
        found.append(_descend(layers, places, stays, rings))
    return min(found, key=lambda split: split.pass_us)


def _descend(
    layers: Sequence[LayerCosts],
    places: list[Place],
    stays: int,
    rings: Rings,
) -> Split:
    """Change sides from these places on, as long as that makes the pass shorter."""
    best = pass_us(layers, places, rings)
    better = True
    while better:
        better = False
        for changed in _moves(stays, len(layers)):
            tried = list(places)
            for layer in changed:
                tried[layer] = Place.COPIED if places[layer] is Place.CPU else Place.CPU
            us = pass_us(layers, tried, rings)
            if us < best * (1 - LEAST_GAIN):
                places, best, better = tried, us, True
    return Split(tuple(places), best, 0.0)


def _moves(stays: int, count: int) -> Iterator[range]:
    """The layers that change sides together: each alone, then each with all that follow."""
    for layer in range(stays, count):
        yield range(layer, layer + 1)
    for layer in range(stays, count):
        yield range(layer, count)


def best_of(candidates: Sequence[Split], cpu_us: float) -> Split | None:
    """The fastest candidate; None where it does not beat the CPU alone by `MARGIN`.

    Args:
        cpu_us: a pass on the CPU alone.
    """
    best = min(candidates, key=lambda split: split.pass_us, default=None)
    if best is None or best.pass_us > cpu_us * (1 - MARGIN):
        return None
    return replace(best, cpu_us=cpu_us)
