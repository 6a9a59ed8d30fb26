"""Where each expert lies: a map of layers and experts.

It is read while a pass may run. A copy of a dictionary's keys is one step of Python's, so it is
whole; a pass that runs in between makes the map a few microseconds old, never wrong in kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.policy.cache import CachePolicy
from hybrimoe_plugin.policy.slots import SlotPool


class Place(IntEnum):
    """Where an expert lies, as two bits of the feed."""

    CPU = 0
    """In main memory alone."""
    ACCELERATOR = 1
    IN_FLIGHT = 2
    FLASH = 3


class ExpertStore(Protocol):
    """What is asked of a target whose experts are on flash, the promising ones in main memory."""

    @property
    def layers(self) -> Sequence[int]:
        """Decoder layers with routed experts."""

    @property
    def policy(self) -> CachePolicy:
        """It has a rank for every expert."""

    @property
    def pool(self) -> SlotPool:
        """Of the experts in main memory."""

    @property
    def chosen(self) -> Mapping[int, NDArray[np.int64]]:
        """Position among the layers -> ids [T, K] of its last call; another array for each call."""


class EngineMap:
    """The experts of a model's engines, a row for each MoE layer.

    Attributes:
        layers: numbers of the decoder layers, ascending.
        experts: the most that any layer has.
        rows: (engine, position among its layers) -> row.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        owned = sorted(
            (weights.layer, which, position)
            for which, engine in enumerate(engines)
            for position, weights in enumerate(engine.layers)
        )
        self.layers = [layer for layer, _, _ in owned]
        self.experts = max(weights.spec.experts for own in engines for weights in own.layers)
        self.rows = {(which, at): row for row, (_, which, at) in enumerate(owned)}

    def places(self, moving: bool) -> NDArray[np.uint8]:
        """[L, E] a `Place` for each expert.

        Args:
            moving: whether calls are being made. The books mark a transfer as done when the next
                call begins; without one, it has long been.
        """
        found = np.full((len(self.layers), self.experts), Place.CPU, np.uint8)
        for (which, position), row in self.rows.items():
            residency = self._engines[which].controller.residency
            found[row, list(residency.pool.cached[position])] = Place.ACCELERATOR
            if moving:
                found[row, list(residency.arriving(position))] = Place.IN_FLIGHT
        return found


def store_places(store: ExpertStore) -> NDArray[np.uint8]:
    """[L, E] a `Place` for each expert of a target on flash."""
    found = np.full(store.policy.ranks.shape, Place.FLASH, np.uint8)
    for row, cached in enumerate(store.pool.cached):
        found[row, list(cached)] = Place.CPU
    return found
