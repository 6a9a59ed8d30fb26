"""Which slot each expert lies in, on the device: what graphs read in place of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from hybrimoe_plugin.compute.backends import ResidentExperts
from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.policy.slots import SlotPool

NOWHERE = -1
"""In place of a slot: the expert is not cached, or has not arrived."""


PLACES = 3
"""Of each row in the host's memory, in turns.

Where the host has read a routing decision, the device has made every copy that was queued before
that decision's graph. So at most three copies of a row may wait when the host writes to the next
place, that one among them (the last of at most two MoE layers, whose miss came out otherwise):

    token t       | miss: send 1, routed again | otherwise: send 2
    token t + 1   | launched ahead: send 3 | its routing is read: 1 and 2 have been made

Send 1 comes behind the second routing of its token: to have read that tells nothing of it. With
more MoE layers the routing of others is read in between.
"""


class SlotTable:
    """A device's copy of an engine's books: [layers, experts] int64, a slot or `NOWHERE`.

    Only a layer's own graphs read its row, so the row is brought up to date before they are
    launched, and at no other time:

        host     evict 7, load 9 -> slot 3          row of layer 5 -> device      graphs of layer 5
        device   (still reads 7 in slot 3)          | ..7: -1 .. 9: 3 .. |        reads 9 in slot 3

    Slot 3 is not written before the last graphs that were launched with the old row are over
    (`SlotAccelerator.used_layer`). An expert is in its row only once its bytes have arrived, so
    nothing waits for the link.

    Args:
        accelerator: the engine's.
    """

    def __init__(self, engine: Engine, accelerator: ResidentExperts) -> None:
        self._controller = engine.controller
        self._accelerator = accelerator
        layers = len(engine.layers)
        shape = layers, max(weights.spec.experts for weights in engine.layers)
        with torch.inference_mode(False):
            self.rows = torch.full(shape, NOWHERE, dtype=torch.int64, device=accelerator.device)
            on_host = [accelerator.pinned_like(self.rows) for _ in range(PLACES)]
            self._copies = [
                (row, [memory[i] for memory in on_host]) for i, row in enumerate(self.rows)
            ]
        """For each layer its row and what copies to it read in turns: the device may make a copy
        behind the next change on the host.
        """
        self._written = [memory.numpy() for memory in on_host]
        self._turn = [0] * layers
        self._shown = np.full(shape, NOWHERE, dtype=np.int64)
        """[L, E] what graphs read that are launched now."""
        self._values = [memoryview(row) for row in self._shown]
        """The same; a single number is read and written in a fraction of an array's time."""
        self.present: list[set[int]] = [set() for _ in range(layers)]
        """Experts of each layer that have a slot in `rows`."""
        self._awaited: list[dict[int, int]] = [{} for _ in range(layers)]
        """Expert -> slot of those on their way, for each layer."""
        self._passing: list[set[int]] = [set() for _ in range(layers)]
        """Experts of each layer that were shown for one call alone."""
        self._differs = [False] * layers
        """Whether a layer's row is not what the device has."""
        self._pool: SlotPool | None = None
        """Whose changes are followed; None: all rows are to be made anew."""

    def update(self, layer: int) -> bool:
        """Bring the host's side of a layer's row up to date: `present`, and what `push` sends.

        An interrupted update needs `forget`.

        Returns:
            whether `push` has something to send.
        """
        pool = self._controller.pool
        if pool is not self._pool:
            self._begin(pool)
        awaited, changed, passing = self._awaited[layer], pool.changed[layer], self._passing[layer]
        if not changed and not awaited and not passing:
            return self._differs[layer]
        present, cached = self.present[layer], pool.cached[layer]
        arrived = self._accelerator.arrived
        for expert in changed | passing:
            present.discard(expert)
            awaited.pop(expert, None)
            slot = cached.get(expert)
            if slot is None or not arrived(slot):
                self._set(layer, expert, NOWHERE)
            if slot is not None:
                awaited[expert] = slot
        changed.clear()
        passing.clear()
        for expert in [expert for expert, slot in awaited.items() if arrived(slot)]:
            self._set(layer, expert, awaited.pop(expert))
            present.add(expert)
        return self._differs[layer]

    def coming(self, layer: int, slots: Mapping[int, int]) -> list[int]:
        """Those of a layer's slots that are not known to hold all bytes of these experts.

        Args:
            slots: expert -> slot, as the books have it now.
        """
        pool = self._controller.pool
        if pool is not self._pool:
            return list(slots.values())
        present, changed = self.present[layer], pool.changed[layer]
        return [
            slot for expert, slot in slots.items() if expert not in present or expert in changed
        ]

    def show(self, layer: int, chosen: Iterable[int], slots: Mapping[int, int]) -> None:
        """Let graphs that are launched next find these slots for a call's experts, and no others.

        What is shown passes with the call: `update` judges these experts anew.

        Args:
            chosen: the call's experts.
            slots: expert -> slot of some of them, whose bytes are there before the graphs run.
        """
        if self._controller.pool is not self._pool:
            self._begin(self._controller.pool)
        row = self._values[layer]
        for expert in chosen:
            slot = slots.get(expert, NOWHERE)
            if row[expert] != slot:
                self._passing[layer].add(expert)
                self.present[layer].discard(expert)
                row[expert] = slot
                self._differs[layer] = True

    def would_miss(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether one of these experts is not `present` in any case, even after an `update`."""
        cached = self._controller.pool.cached[layer]
        return not all(map(cached.__contains__, experts))

    def push(self, layer: int) -> None:
        """Send a layer's row, as `update` left it, for graphs that are launched behind this."""
        if not self._differs[layer]:
            return
        turn = self._turn[layer] = (self._turn[layer] + 1) % PLACES
        target, sources = self._copies[layer]
        self._written[turn][layer] = self._shown[layer]
        target.copy_(sources[turn], non_blocking=True)
        self._differs[layer] = False

    def _set(self, layer: int, expert: int, slot: int) -> None:
        row = self._values[layer]
        if row[expert] != slot:
            self._differs[layer] = True
            row[expert] = slot

    def forget(self) -> None:
        """Make every row anew; the device must be idle."""
        self._pool = None

    def _begin(self, pool: SlotPool) -> None:
        """Follow another pool, or the same one after an interrupt."""
        self._shown.fill(NOWHERE)
        self.rows.fill_(NOWHERE)
        for present in self.present:
            present.clear()
        self._awaited = [dict(cached) for cached in pool.cached]
        for experts in (*pool.changed, *self._passing):
            experts.clear()
        self._differs = [False] * len(self.present)
        self._pool = pool
