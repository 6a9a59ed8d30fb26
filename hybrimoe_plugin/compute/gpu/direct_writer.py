"""Write whole experts into slots by addresses that were worked out when the slots were made.

What is left to do for an expert are the device's own calls:

    as stored    copy gate, copy up | event | copy down | event
    in planes    copy gate, copy up, copy down | event | rearrange all at once | event

Rearranging begins when all parts have arrived. Computing gate and up earlier would gain little: it
takes a small share of the time in which down crosses the link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hybrimoe_plugin.compute.gpu.layer_path import LayerPath
from hybrimoe_plugin.compute.gpu.repack_buffers import RepackBuffers
from hybrimoe_plugin.compute.gpu.transfer_executor import QueuedWork
from hybrimoe_plugin.device.streams import REPACK, Event, Streams
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import LayerWeights


class DirectWriter:
    """Writes slots by address; used by the thread that plans transfers.

    Args:
        streams: the device's queues, which take addresses.
        buffer: [slots, slot bytes] uint8 on the device.
        repack: what parts in planes cross the link into.
        paths: id of a layer's weights -> its path. Their memory stays where it is.

    Raises:
        BackendError: a layer's parts do not fit into a slot, or into the repack buffers.
    """

    def __init__(
        self,
        streams: Streams,
        buffer: torch.Tensor,
        repack: RepackBuffers,
        paths: Mapping[int, LayerPath],
    ) -> None:
        self._streams = streams
        self._slots = buffer.unbind()
        self._starts = [slot.data_ptr() for slot in self._slots]
        self._repack = repack
        self._arrivals = [arrived.data_ptr() for arrived in repack.buffers]
        self._paths = paths
        room = min((arrived.numel() for arrived in repack.buffers), default=0)
        for path in paths.values():
            _check_fits(path, buffer.shape[1], room)

    def takes(self, weights: LayerWeights, expert: int) -> bool:
        """Whether an expert's bytes can be read where they are."""
        path = self._paths.get(id(weights))
        return path is not None and path.sources[expert] is not None

    def write(
        self,
        slot: int,
        weights: LayerWeights,
        expert: int,
        queue: str,
        older: Sequence[QueuedWork],
    ) -> tuple[Event, Event]:
        """Queue the whole transfer of an expert that `takes` accepts.

        Args:
            queue: `LINK` or `AHEAD`.
            older: what writing the slot must wait for.

        Returns:
            The events after which gate, up and biases are there, and after which all is; the same
            one where it is not known earlier.

        Raises:
            BackendError: there is no such slot or expert, or the device refuses.
        """
        path = self._paths[id(weights)]
        sources = path.sources[expert]
        if sources is None or not (0 <= slot < len(self._starts) and expert >= 0):
            raise BackendError(
                f"slot {slot} of {len(self._starts)} cannot take expert {expert} of layer "
                f"{weights.layer} directly"
            )
        if path.planar:
            return self._write_planes(slot, path, sources, queue, older)
        self._wait_for(queue, older)
        start, copy = self._starts[slot], self._streams.copy
        *first, down = path.pieces
        for source, offset, size, _ in first:
            copy(queue, start + offset, sources[source], size)
        gate_up = self._streams.record(queue)
        copy(queue, start + down.offset, sources[down.source], down.size)
        return gate_up, self._streams.record(queue)

    def _write_planes(
        self,
        slot: int,
        path: LayerPath,
        sources: tuple[int, ...],
        queue: str,
        older: Sequence[QueuedWork],
    ) -> tuple[Event, Event]:
        """Copy parts in planes into repack buffers, and rearrange all of them at the end."""
        streams = self._streams
        # REPACK comes after what is copied, so it need not wait itself where parts are copied into
        # the slot as well.
        self._wait_for(REPACK if path.planar == len(path.pieces) else queue, older)
        taken = self._repack.take(queue, path.planar)
        unused = iter(taken)
        start = self._starts[slot]
        for source, offset, size, planar in path.pieces:
            target = self._arrivals[next(unused)] if planar else start + offset
            streams.copy(queue, target, sources[source], size)
        streams.wait(REPACK, streams.record(queue))  # edge: copied -> repacking
        arrived = [self._repack.buffers[index] for index in taken]
        repack, room = path.repack, self._slots[slot]
        assert repack is not None, "some parts are in planes"
        streams.launch(REPACK, lambda stream: repack(arrived, room, stream))
        there = streams.record(REPACK)
        self._repack.give_back(taken, there)
        return there, there

    def _wait_for(self, queue: str, older: Sequence[QueuedWork]) -> None:
        for work in older:
            for event in work.result():
                self._streams.wait(queue, event)  # edge: last use of the slot -> its next content


def _check_fits(path: LayerPath, slot_bytes: int, repack_bytes: int) -> None:
    for piece in path.pieces:
        if piece.offset < 0 or piece.offset + piece.size > slot_bytes:
            raise BackendError(f"a slot of {slot_bytes} bytes cannot take {piece}")
        if piece.planar and piece.size > repack_bytes:
            raise BackendError(f"a repack buffer of {repack_bytes} bytes cannot take {piece}")
