"""Which slot each expert lies in, on the device: what graphs read in place of a plan."""

from __future__ import annotations

import numpy as np
import torch

from hybrimoe_plugin.compute.backends import ResidentExperts
from hybrimoe_plugin.engine import Engine

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
        shape = len(engine.layers), max(weights.spec.experts for weights in engine.layers)
        with torch.inference_mode(False):
            self.rows = torch.full(shape, NOWHERE, dtype=torch.int64, device=accelerator.device)
            self._on_host = accelerator.pinned_like(self.rows)
            self._on_host.fill_(NOWHERE)
        self.shown = self._on_host.numpy()
        """[L, E] what graphs read that are launched now."""
        self._awaited: list[dict[int, int]] = [{} for _ in engine.layers]
        """Expert -> slot of those on their way, for each layer."""

    def update(self, layer: int) -> None:
        """Bring a layer's row up to date, for graphs that are launched behind this."""
        pool = self._controller.pool
        arrived = self._accelerator.arrived
        if layer not in pool.changed and not any(map(arrived, self._awaited[layer].values())):
            return
        row = self.shown[layer]
        before = row.copy()
        awaited = {}
        row.fill(NOWHERE)
        for expert, slot in pool.cached[layer].items():
            if arrived(slot):
                row[expert] = slot
            else:
                awaited[expert] = slot
        if not np.array_equal(row, before):
            self.rows[layer].copy_(self._on_host[layer], non_blocking=True)
        self._awaited[layer] = awaited
        pool.changed.discard(layer)  # only now: an interrupted update comes again

    def forget(self) -> None:
        """Make every row be sent again: an update may have been interrupted."""
        self.shown.fill(NOWHERE)
        self._controller.pool.changed.update(range(len(self.shown)))
        self.rows.fill_(NOWHERE)
