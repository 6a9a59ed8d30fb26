"""Bring experts into slots: copies, repacking, and the events by which compute waits for them.

A slot receives gate and up first, then down, so that compute can start on the first two. A part
that is kept in planes (`layout`) is copied into a repack buffer and rearranged from there:

    LINK or AHEAD   | gate -> buffer 0 | up -> buffer 1 | down -> buffer 2 |
    REPACK                             | 0 -> planes    | 1 -> planes      | 2 -> planes |
    COMPUTE                                                 gate and up ^         down ^

That is the plain way (`slot_writer`). The direct one (`direct_writer`), a fraction of the host's
time, rearranges a whole expert in one launch, for which compute then waits.

Prefetches wait here until the link has room; one that is superseded by then never crosses it.

Transfers may be queued by another thread (`transfer_executor`). Then the bytes, the repack buffers
and the queues that write slots belong to that thread alone; which slot holds what, and what
compute waits for, belongs to the caller.

A call can end at any line, by Ctrl-C or an error. So `held` says of a slot what it holds only
after all of its transfer has been submitted, and nothing from before the first byte of the next
one; `settle` then finds the rest.

    send(A -> slot 3):   held[3] gone | gate, up submitted | down submitted | held[3] = A
                                      ^ ended here: slot 3 holds nothing for certain
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.compute.gpu.direct_writer import DirectWriter
from hybrimoe_plugin.compute.gpu.host_bytes import HostBytes
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout
from hybrimoe_plugin.compute.gpu.layer_path import LayerPath
from hybrimoe_plugin.compute.gpu.repack_buffers import RepackBuffers
from hybrimoe_plugin.compute.gpu.slot_uses import SlotUses
from hybrimoe_plugin.compute.gpu.slot_writer import SlotWriter
from hybrimoe_plugin.compute.gpu.transfer_executor import (
    DoneWork,
    InlineExecutor,
    QueuedWork,
    TransferExecutor,
)
from hybrimoe_plugin.device.streams import AHEAD, COMPUTE, LINK, Streams
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import Bytes, LayerWeights

AHEAD_DEPTH = 2
"""Prefetches that the device has at once.

Copies share one engine that serves them in the order of their arrival, whatever their streams'
priorities: a demand load waits for every prefetch before it. Two keep the link busy, one crossing
it while the next is ready.
"""


class Transfer(NamedTuple):
    """One expert on its way into one slot."""

    slot: int
    layout: SlotLayout
    weights: LayerWeights
    expert: int

    @property
    def parts(self) -> tuple[tuple[Part, Bytes], ...]:
        """Gate, up, down and biases: where each goes in the slot, and its stored bytes."""
        return tuple(zip(self.layout.parts, self.weights.stored(self.expert), strict=True))


class SlotTransfers:
    """The slots' traffic on one device.

    Attributes:
        held: slot -> the transfer that fills it, once all of it has been submitted.
        cancelled: prefetches that were superseded before they crossed the link.

    Args:
        streams: the device's queues.
        kernels: rearrange parts into planes on arrival.
        host: where bytes are read from.
        buffer: [slots, slot bytes] uint8 on the device.
        repack_bytes: of the largest matrix that is kept in planes, 0 for none.
        ahead_depth: most prefetches that the device has at once.
        executor: queues transfers on the device; this object closes it.
        paths: id of a layer's weights -> how its experts go the direct way, where they can. Without
            any, and with an executor that is a thread of its own, all go the plain way.
    """

    def __init__(
        self,
        streams: Streams,
        kernels: Kernels,
        host: HostBytes,
        buffer: torch.Tensor,
        repack_bytes: int,
        ahead_depth: int = AHEAD_DEPTH,
        executor: TransferExecutor | None = None,
        paths: Mapping[int, LayerPath] | None = None,
    ) -> None:
        self.held: dict[int, Transfer] = {}
        self.cancelled = 0
        self._streams = streams
        self._buffer = buffer
        self._ahead_depth = ahead_depth
        self._executor = executor or InlineExecutor()
        self._repack = RepackBuffers(streams, repack_bytes, buffer.device)
        self._writer = SlotWriter(streams, kernels, host, buffer, self._repack)
        self._direct: DirectWriter | None = None
        if paths and isinstance(self._executor, InlineExecutor):
            self._direct = DirectWriter(streams, buffer, self._repack, paths)
        self._waiting: dict[int, Transfer] = {}
        """Slot -> a prefetch that the device has not got yet, oldest first."""
        self._ahead: deque[QueuedWork] = deque()
        """Prefetches that the device has got and that have not crossed the link, oldest first."""
        self._gate_up: dict[int, QueuedWork] = {}
        self._down: dict[int, QueuedWork] = {}
        """Slot -> what compute has not waited for yet."""
        self._arriving: dict[int, tuple[QueuedWork, ...]] = {}
        """Slot -> all of a transfer that the host has not seen the end of."""
        self._uses = SlotUses(len(buffer))
        # Memory that compute gave back a moment ago may still be read there: nothing is written
        # before that is over.
        streams.synchronize()

    def send(self, transfer: Transfer, ahead: bool = False) -> None:
        """Fill a slot; `ahead` for a prefetch, which may wait and be superseded."""
        slot = transfer.slot
        self.held.pop(slot, None)
        if slot in self._waiting:
            self.cancel(slot)
        if ahead:
            self._waiting[slot] = transfer
            self.pump()
        else:
            self._start(transfer, LINK)

    def cancel(self, slot: int) -> bool:
        """Drop the slot's transfer if the device has not got it; then the slot holds nothing."""
        if self._waiting.pop(slot, None) is None:
            return False
        self.cancelled += 1
        return True

    def pump(self) -> None:
        """Give the device as many waiting prefetches as it should have."""
        if not self._waiting:
            return
        while self._ahead and self._reached(self._ahead[0]):
            self._ahead.popleft()
        while self._waiting and len(self._ahead) < self._ahead_depth:
            oldest = next(iter(self._waiting))
            self._start(self._waiting.pop(oldest), AHEAD)
            self._ahead.append(self._arriving[oldest][-1])

    def wait_gate_up(self, slots: Sequence[int]) -> SlotLayout:
        """Let compute go on only when gate and up of these slots, all of one layer, have arrived.

        Returns:
            their layout.

        Raises:
            BackendError: a slot was never filled, its transfer was cancelled, or any transfer has
                failed.
        """
        layouts = self._sent(slots)
        layout = layouts[0]
        assert layouts.count(layout) == len(slots), "one call computes one layer"
        self._wait(self._gate_up, slots)  # edge: gate and up have arrived -> stage 1
        return layout

    def wait_down(self, slots: Iterable[int]) -> None:
        """The same for down. Raises: BackendError: any transfer has failed."""
        self._wait(self._down, slots)  # edge: down has arrived -> stage 2

    def wait_all(self, slots: Sequence[int]) -> None:
        """The same for all of their bytes. Raises: BackendError: as `wait_gate_up`."""
        self._executor.check()
        self._sent([slot for slot in slots if slot in self._waiting or slot not in self.held])
        for slot in slots:
            for work in self._arriving.get(slot, ()):
                for event in work.result():
                    self._streams.wait(COMPUTE, event)  # edge: all has arrived -> both stages
            self._forget_arrival(slot)  # only now, as in `_wait`

    def used(self, slots: Sequence[int]) -> None:
        """Note that compute, as far as it is queued, contains these slots' last use."""
        self._uses.slots(slots, self._streams.record(COMPUTE))

    def used_layer(self, weights: LayerWeights) -> None:
        """Note that compute, as far as it is queued, used any slots that hold this layer's experts.

        For work that looks its slots up on the device. To be called before the next `send`, which
        may give one of them away. Costs the same however many slots there are.
        """
        self._uses.layer(weights, self._streams.record(COMPUTE))

    def arrived(self, slot: int) -> bool:
        """Whether all that the slot was last sent is there for what compute is given from now on.

        It has arrived, or compute waits for it already (`wait_all`). The host does not wait. False
        for a slot that was sent nothing, or whose prefetch still waits or was cancelled.

        Raises:
            BackendError: its transfer has failed.
        """
        if slot not in self.held:
            return False
        arriving = self._arriving.get(slot)
        if arriving is None:
            return True
        reached = all(self._reached(half) for half in arriving)
        if reached:
            self._forget_arrival(slot)
        return reached

    def settle(self) -> None:
        """After an unfinished call: wait for what was submitted, drop the rest, keep what is sure.

        The host waits for the device, so that no edge to older work is needed from then on.

        Mutates: `held`, which then lists only slots whose bytes have arrived.
        """
        self._waiting.clear()
        self._executor.drain()
        self._streams.synchronize()
        for queued in (self._gate_up, self._down):
            for slot, work in queued.items():
                if _failed(work):
                    self.held.pop(slot, None)
        self._executor.forget_failure()
        self._ahead.clear()
        self._gate_up.clear()
        self._down.clear()
        self._arriving.clear()
        self._uses.forget()
        self._repack.settle()

    def holds(self, slot: int, weights: LayerWeights, expert: int) -> bool:
        """Whether a slot has an expert's bytes as the file has them, or waits for them.

        The host must have waited for the device.
        """
        waits = slot in self._waiting
        transfer = self._waiting[slot] if waits else self.held.get(slot)
        if transfer is None or transfer.weights is not weights or transfer.expert != expert:
            return False
        return waits or self._writer.has_written(slot, transfer.parts)

    def drain(self) -> None:
        """Wait until the device has got everything; `synchronize` of its queues may follow."""
        self._executor.drain()

    def check(self) -> None:
        """Raises: BackendError: a transfer has failed."""
        self._executor.check()

    def close(self) -> None:
        """As `drain`, for good."""
        self._executor.close()

    def _sent(self, slots: Iterable[int]) -> list[SlotLayout]:
        """The layouts of slots that have been sent their bytes, now at the latest."""
        layouts = []
        for slot in slots:
            if slot in self._waiting:  # needed now: it goes before the other prefetches
                self._start(self._waiting.pop(slot), LINK)
            if slot not in self.held:
                raise BackendError(f"slot {slot} was never onloaded")
            layouts.append(self.held[slot].layout)
        return layouts

    def _wait(self, queued: dict[int, QueuedWork], slots: Iterable[int]) -> None:
        self._executor.check()
        if queued.keys().isdisjoint(slots):
            return
        for slot in slots:
            work = queued.get(slot)
            if work is None:
                continue
            for event in work.result():
                self._streams.wait(COMPUTE, event)
            if self._down.get(slot) is work:  # one event for both halves
                del self._down[slot]
            queued.pop(slot, None)  # only now: an interrupted wait must come again

    def _reached(self, work: QueuedWork) -> bool:
        if not work.done():
            return False
        return all(self._streams.reached(event) for event in work.result())

    def _forget_arrival(self, slot: int) -> None:
        """What compute is given from now on comes after the slot's transfer without an edge."""
        self._gate_up.pop(slot, None)
        self._down.pop(slot, None)
        self._arriving.pop(slot, None)  # last: `_start` looks here for what is left of the others

    def _start(self, transfer: Transfer, queue: str) -> None:
        """Submit all of a transfer."""
        slot, _, weights, expert = transfer
        # Whatever writes this slot now comes after its last use, and after an older transfer that
        # compute did not wait for. That one has been queued when this one is: jobs keep their
        # order.
        gate_up, down = self._gate_up.pop(slot, None), self._down.pop(slot, None)
        unseen = gate_up is not None or down is not None
        older = self._arriving[slot] if unseen else ()
        last_use = self._uses.refill(slot, weights)
        if last_use is not None:
            older = *older, DoneWork((last_use,))
        direct = self._direct
        if direct is not None and direct.takes(weights, expert):
            first, last = direct.write(slot, weights, expert, queue, older)
            down = DoneWork((last,))
            gate_up = down if first is last else DoneWork((first,))
            self._arriving[slot] = (down,)
        else:
            gate_up, down = self._submit(transfer, queue, older)
            self._arriving[slot] = gate_up, down
        self._gate_up[slot] = gate_up
        self._down[slot] = down
        self.held[slot] = transfer

    def _submit(
        self, transfer: Transfer, queue: str, older: Sequence[QueuedWork]
    ) -> tuple[QueuedWork, QueuedWork]:
        """Let the executor write both halves the plain way."""
        slot = transfer.slot
        ordered: set[str] = set()
        gate, up, down, *biases = transfer.parts
        write = self._writer.write
        first = self._executor.submit(
            lambda: write(slot, queue, (gate, up, *biases), older, ordered)
        )
        second = self._executor.submit(lambda: write(slot, queue, (down,), older, ordered))
        return first, second


def _failed(work: QueuedWork) -> bool:
    try:
        work.result()
    except BackendError:
        return True
    return False
