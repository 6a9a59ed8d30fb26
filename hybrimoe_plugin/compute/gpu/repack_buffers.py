"""Buffers that matrices cross the link into before they are rearranged into planes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hybrimoe_plugin.device.streams import Event, Streams

REPACK_BUFFERS = 6
"""Two experts' matrices: one expert is copied while the one before it is rearranged."""


class RepackBuffers:
    """A ring of buffers, each written again once its last rearranging is over.

    Args:
        streams: the device's queues.
        nbytes: of the largest matrix that is kept in planes, 0 for none.
        device: where the buffers lie.
    """

    def __init__(self, streams: Streams, nbytes: int, device: torch.device) -> None:
        self._streams = streams
        count = REPACK_BUFFERS if nbytes else 0
        self.buffers = tuple(
            torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)
        )
        self._free: list[Event | None] = [None] * count
        """For each buffer, the event after which it may be written again."""
        self._next = 0

    def take(self, queue: str, count: int) -> list[int]:
        """The next buffers, for copies that the queue makes from now on; the host does not wait."""
        taken = []
        awaited: Event | None = None
        for _ in range(count):
            index = self._next
            self._next = (index + 1) % REPACK_BUFFERS
            free = self._free[index]
            if free is not None and free is not awaited:
                self._streams.wait(queue, free)  # edge: the buffer's last repacking -> next copy
                awaited = free
            taken.append(index)
        return taken

    def give_back(self, taken: Iterable[int], event: Event) -> None:
        """These buffers have been read once the event is reached."""
        for index in taken:
            self._free[index] = event

    def settle(self) -> None:
        """Forget edges to older work, which the host has waited for."""
        self._free = [None] * len(self._free)
