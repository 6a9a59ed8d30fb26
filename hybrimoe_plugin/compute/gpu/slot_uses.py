"""When compute last used each slot: noted for single slots, or for every slot of a layer at once.

A graph that looks its slots up on the device uses slots that the host does not know. The host then
notes the use of the layer: it counts for every slot that holds one of its experts, until another
expert is written there.

    slot 3 holds A.5 | used_layer(A) | used([3]) | B.1 -> slot 3: after used([3])
    slot 4 holds A.6 | used_layer(A) |           | B.2 -> slot 4: after used_layer(A)
    slot 5 holds B.7 | used_layer(A) |           | B.3 -> slot 5: at once

`COMPUTE` is one queue in order, so the later of two uses stands for both. Uses are numbered, and
only the last events are kept: the oldest of them stands for all uses before it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable

from hybrimoe_plugin.device.streams import Event
from hybrimoe_plugin.weights.layer_weights import LayerWeights

KEPT = 128
"""Events; far more uses than a device lags behind, so the oldest was reached long since."""

_Owner = tuple[int, int]
"""The layer whose expert a slot holds, by the id of its weights, and the number of the last use
before the slot was given to it.
"""

_NOBODY: _Owner = (0, 0)


class SlotUses:
    """The last use of each slot's content.

    Args:
        slots: how many there are.
    """

    def __init__(self, slots: int) -> None:
        self._count = 0
        """Uses that were noted; each has this count as its number."""
        self._over = 0
        """Uses up to this number are over."""
        self._events: deque[Event] = deque(maxlen=KEPT)
        """Of the last uses, oldest first."""
        # Plain numbers: to note a use touches no object of the last one, which has left the
        # processor's caches long since.
        self._of_slot = array("q", bytes(8 * slots))
        """Number of each slot's last use; 0 for none."""
        self._of_layer: dict[int, int] = {}
        self._owners: dict[int, _Owner] = {}

    def slots(self, slots: Iterable[int], event: Event) -> None:
        """These slots are used no later than the event."""
        number = self._next(event)
        of_slot = self._of_slot
        for slot in slots:
            of_slot[slot] = number

    def layer(self, weights: LayerWeights, event: Event) -> None:
        """Whatever slots this layer's experts are in now are used no later than the event."""
        self._of_layer[id(weights)] = self._next(event)

    def refill(self, slot: int, weights: LayerWeights) -> Event | None:
        """Give a slot to an expert of this layer.

        Returns:
            The last use of what the slot held before, or a later one; None where there was none.
        """
        number = self._of_slot[slot]
        layer, since = self._owners.get(slot, _NOBODY)
        of_layer = self._of_layer.get(layer, 0)
        if of_layer > max(number, since):
            number = of_layer
        self._of_slot[slot] = 0
        self._owners[slot] = id(weights), self._count
        if number <= self._over:
            return None
        later = min(self._count - number, len(self._events) - 1)
        return self._events[-1 - later]

    def forget(self) -> None:
        """All uses so far are over: the host has waited for the device."""
        self._over = self._count
        self._events.clear()

    def _next(self, event: Event) -> int:
        self._events.append(event)
        self._count += 1
        return self._count
