"""Which layers an accelerator computes, by measured costs (paper 2c: execution mapping). Pure: no
torch, no devices.

A pass is three queues: reads from flash in the order of layers, copies over the link, and
computing, where each layer needs the one before. A layer's buffer is read into again when the layer
was computed on the CPU or copied away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

MARGIN = 0.02
"""The accelerator must be predicted to save at least this share of a pass, or everything stays on
the CPU.
"""
PASSES = 3
"""Simulated passes; the last one's length counts, when buffers are as full as they stay."""


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
    """Microseconds that were measured for a layer of one shape and a tree's rows."""

    read_us: float
    """From flash; 0 for layers in DRAM."""
    copy_us: float
    """From DRAM to the accelerator."""
    cpu_us: float
    device_us: float

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
    """A decision and what is expected of it."""

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
        further = (", output head there" if self.head else "") + (
            ", experts sent there" if self.experts else ""
        )
        return (
            f"{device}: of {len(self.places)} layers {self.stays} live there, {copied} are copied "
            f"there for each pass, "
            f"{len(self.places) - self.stays - copied} compute on the CPU{further}; predicted "
            f"{self.pass_us / 1e3:.1f} ms a pass, {self.cpu_us / 1e3:.1f} ms on the CPU alone"
        )


def pass_us(layers: Sequence[LayerCosts], places: Sequence[Place], rings: Rings) -> float:
    """Length of a pass once passes follow one another.

    Args:
        layers, places: in the order of execution.
    """
    read = link = compute = before = 0.0
    freed, used = [0.0] * rings.host, [0.0] * rings.device
    for _ in range(PASSES):
        before, away = compute, False
        for cost, place in zip(layers, places, strict=True):
            ready, streamed = 0.0, cost.read_us > 0 and place is not Place.STAYS
            if streamed:
                ready = read = max(read, freed[-rings.host]) + cost.read_us
            if place is Place.COPIED:
                ready = link = max(link, ready, used[-rings.device]) + cost.copy_us
            there = place is not Place.CPU
            begin = compute + (rings.hop_us if there != away else 0.0)
            compute = max(begin, ready) + (cost.device_us if there else cost.cpu_us)
            away = there
            if streamed:
                freed.append(link if place is Place.COPIED else compute)
            if place is Place.COPIED:
                used.append(compute)
        compute += rings.hop_us if away else 0.0
    return compute - before


def choose_places(layers: Sequence[LayerCosts], stays: int, rings: Rings) -> Split:
    """The best places found for the layers after the first `stays`, which live on the accelerator.

    From everything on the CPU, and from everything on the accelerator, single layers and whole
    tails change sides while that makes the pass shorter.
    """
    count = len(layers)
    found = []
    for start in (Place.CPU, Place.COPIED):
        places = [Place.STAYS] * stays + [start] * (count - stays)
        best = pass_us(layers, places, rings)
        better = True
        while better:
            better = False
            for changed in [range(layer, layer + 1) for layer in range(stays, count)] + [
                range(layer, count) for layer in range(stays, count)
            ]:
                tried = list(places)
                for layer in changed:
                    tried[layer] = Place.COPIED if places[layer] is Place.CPU else Place.CPU
                us = pass_us(layers, tried, rings)
                if us < best * (1 - 1e-3):
                    places, best, better = tried, us, True
        found.append(Split(tuple(places), best, 0.0))
    return min(found, key=lambda split: split.pass_us)


def best_of(candidates: Sequence[Split], cpu_us: float) -> Split | None:
    """The quickest candidate; None where all on the CPU, which takes `cpu_us`, is within `MARGIN`
    of it.
    """
    best = min(candidates, key=lambda split: split.pass_us, default=None)
    return (
        None
        if best is None or best.pass_us > cpu_us * (1 - MARGIN)
        else replace(best, cpu_us=cpu_us)
    )
