"""Which slot each expert lies in, on the device: what graphs read in place of a plan."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from hybrimoe_plugin.compute.backends import ResidentExperts
from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.policy.slots import SlotPool

NOWHERE = -1
"""In place of a slot: the expert is not cached, or has not arrived."""


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
            self._on_host = [accelerator.pinned_like(self.rows) for _ in range(2)]
        """What copies to the device read, which may come after the next change on the host.

        In turns: a layer's routing is known before its row is changed twice, so the copy before
        has been made by then.
        """
        self._written = [memory.numpy() for memory in self._on_host]
        self._turn = [0] * layers
        self._shown = np.full(shape, NOWHERE, dtype=np.int64)
        """[L, E] what graphs read that are launched now."""
        self.present: list[set[int]] = [set() for _ in range(layers)]
        """Experts of each layer that have a slot in `rows`."""
        self._awaited: list[dict[int, int]] = [{} for _ in range(layers)]
        """Expert -> slot of those on their way, for each layer."""
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
        awaited, changed = self._awaited[layer], pool.changed[layer]
        if not changed and not awaited:
            return self._differs[layer]
        row, present, cached = self._shown[layer], self.present[layer], pool.cached[layer]
        differs = self._differs[layer]
        for expert in changed:
            if expert in present:
                present.discard(expert)
                row[expert] = NOWHERE
                differs = True
            awaited.pop(expert, None)
            if expert in cached:
                awaited[expert] = cached[expert]
        changed.clear()
        arrived = self._accelerator.arrived
        for expert in [expert for expert, slot in awaited.items() if arrived(slot)]:
            row[expert] = awaited.pop(expert)
            present.add(expert)
            differs = True
        self._differs[layer] = differs
        return differs

    def would_miss(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether one of these experts is not `present` in any case, even after an `update`."""
        cached = self._controller.pool.cached[layer]
        return not all(map(cached.__contains__, experts))

    def push(self, layer: int) -> None:
        """Send a layer's row, as `update` left it, for graphs that are launched behind this."""
        if not self._differs[layer]:
            return
        self._turn[layer] ^= 1
        turn = self._turn[layer]
        self._written[turn][layer] = self._shown[layer]
        self.rows[layer].copy_(self._on_host[turn][layer], non_blocking=True)
        self._differs[layer] = False

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
        for changed in pool.changed:
            changed.clear()
        self._differs = [False] * len(self.present)
        self._pool = pool
