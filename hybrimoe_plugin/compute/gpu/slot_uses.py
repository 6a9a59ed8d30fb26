"""When compute last used each slot: noted for single slots, or for every slot of a layer at once.

A graph that looks its slots up on the device uses slots that the host does not know. The host then
notes the use of the layer: it counts for every slot that holds one of its experts, until another
expert is written there.

    slot 3 holds A.5 | used_layer(A) | used([3]) | B.1 -> slot 3: after used([3])
    slot 4 holds A.6 | used_layer(A) |           | B.2 -> slot 4: after used_layer(A)
    slot 5 holds B.7 | used_layer(A) |           | B.3 -> slot 5: at once

`COMPUTE` is one queue in order, so the later of two uses stands for both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hybrimoe_plugin.device.streams import Event
from hybrimoe_plugin.weights.layer_weights import LayerWeights


class _Use(NamedTuple):
    number: int
    """Of all uses that were noted, counted from 1."""
    event: Event


class _Owner(NamedTuple):
    """The layer whose expert a slot holds."""

    layer: int
    """The id of its weights."""
    since: int
    """Number of the last use before the slot was given to it."""


_NEVER = _Use(0, None)


class SlotUses:
    """The last use of each slot's content."""

    def __init__(self) -> None:
        self._count = 0
        self._of_slot: dict[int, _Use] = {}
        self._of_layer: dict[int, _Use] = {}
        self._owners: dict[int, _Owner] = {}

    def slots(self, slots: Iterable[int], event: Event) -> None:
        """These slots are used no later than the event."""
        use = self._next(event)
        for slot in slots:
            self._of_slot[slot] = use

    def layer(self, weights: LayerWeights, event: Event) -> None:
        """Whatever slots this layer's experts are in now are used no later than the event."""
        self._of_layer[id(weights)] = self._next(event)

    def refill(self, slot: int, weights: LayerWeights) -> Event | None:
        """Give a slot to an expert of this layer.

        Returns:
            The last use of what the slot held before; None where there was none.
        """
        use = self._of_slot.pop(slot, _NEVER)
        owner = self._owners.get(slot)
        if owner is not None:
            of_layer = self._of_layer.get(owner.layer, _NEVER)
            if of_layer.number > max(use.number, owner.since):
                use = of_layer
        self._owners[slot] = _Owner(id(weights), self._count)
        return use.event

    def forget(self) -> None:
        """All uses so far are over: the host has waited for the device."""
        self._of_slot.clear()
        self._of_layer.clear()

    def _next(self, event: Event) -> _Use:
        self._count += 1
        return _Use(self._count, event)
