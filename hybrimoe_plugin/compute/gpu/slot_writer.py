"""Queue the device work of one transfer: copies over the link and repacking into planes.

One matrix at a time in torch's own operations, from wherever the host keeps its bytes. This is the
plain twin of `direct_writer`, and its fallback.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrimoe_plugin.compute.gpu.host_bytes import HostBytes
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels
from hybrimoe_plugin.compute.gpu.kernels.layout import Part
from hybrimoe_plugin.compute.gpu.repack_buffers import RepackBuffers
from hybrimoe_plugin.compute.gpu.transfer_executor import Events, QueuedWork
from hybrimoe_plugin.device.streams import REPACK, Streams
from hybrimoe_plugin.weights.layer_weights import Bytes


class SlotWriter:
    """Writes slots; used by the one thread that queues transfers.

    Args:
        streams: the device's queues.
        kernels: rearrange parts into planes.
        host: where bytes are read from.
        buffer: [slots, slot bytes] uint8 on the device.
        repack: what parts in planes cross the link into.
    """

    def __init__(
        self,
        streams: Streams,
        kernels: Kernels,
        host: HostBytes,
        buffer: torch.Tensor,
        repack: RepackBuffers,
    ) -> None:
        self._streams = streams
        self._kernels = kernels
        self._host = host
        self._buffer = buffer
        self._repack = repack

    def has_written(self, slot: int, parts: Sequence[tuple[Part, Bytes]]) -> bool:
        """Whether a slot holds these parts as they should lie there; waits for the device."""
        for part, stored in parts:
            found = self._buffer[slot, part.span]
            wanted = torch.from_numpy(stored.copy()).to(found.device)
            if part.planar:
                raw = wanted
                wanted = torch.empty_like(found)
                self._kernels.repack(part, raw, wanted)
            if not torch.equal(found, wanted):
                return False
        return True

    def write(
        self,
        slot: int,
        queue: str,
        parts: Sequence[tuple[Part, Bytes]],
        older: Sequence[QueuedWork],
        ordered: set[str],
    ) -> Events:
        """Queue some matrices of one transfer.

        Args:
            queue: `LINK` or `AHEAD`.
            older: what writing the slot must wait for.
            ordered: the queues that already wait for it. Mutates.

        Returns:
            The last event of each queue that writes these matrices.
        """
        writers = []
        for part, stored in parts:
            writer = REPACK if part.planar else queue
            if writer not in ordered:
                ordered.add(writer)
                self._wait_for(writer, older)  # edge: last use of the slot -> its next content
            target = self._buffer[slot, part.span]
            if part.planar:
                self._copy_and_repack(queue, part, stored, target)
            else:
                self._copy(queue, stored, target)
            if writer not in writers:
                writers.append(writer)
        return tuple(self._streams.record(writer) for writer in writers)

    def _wait_for(self, queue: str, older: Sequence[QueuedWork]) -> None:
        for work in older:
            for event in work.result():
                self._streams.wait(queue, event)

    def _copy(self, queue: str, stored: Bytes, target: torch.Tensor) -> None:
        source = self._host.source(stored)
        self._streams.enqueue(queue, lambda: _copy_async(source, target))
        if self._host.reuses:
            self._host.sent(self._streams.record(queue))

    def _copy_and_repack(self, queue: str, part: Part, stored: Bytes, target: torch.Tensor) -> None:
        """Copy into a repack buffer, and rearrange from there into the slot."""
        taken = self._repack.take(queue, 1)
        arrived = self._repack.buffers[taken[0]][: part.size]
        self._copy(queue, stored, arrived)
        self._streams.wait(REPACK, self._streams.record(queue))  # edge: copied -> repacking
        self._streams.enqueue(REPACK, lambda: self._kernels.repack(part, arrived, target))
        self._repack.give_back(taken, self._streams.record(REPACK))


def _copy_async(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
