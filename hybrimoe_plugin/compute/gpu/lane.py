"""Brings experts into slots: transfer, repacking and the events by which compute waits for them.

A slot has two arrivals: gate and up, then down, so that compute can start on the first. Prefetches
wait here until the link has room for them; one that is superseded meanwhile never crosses it.

What the device is given may be given to it by another thread (`issue`). Bytes, landing buffers and
the queues that write slots are then that thread's alone; which slot holds what, and what compute
waits for, is the caller's.

A call can end at any line, by Ctrl-C or an error. So `held` says of a slot what it holds only after
all of the transfer has been issued, and nothing from before the first byte of the next one;
`settle` then finds the rest.

    send(A -> slot 3):   held[3] gone | gate, up issued | down issued | held[3] = A
                                      ^ ended here: slot 3 holds nothing for certain
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.compute.gpu.host_bytes import HostBytes
from hybrimoe_plugin.compute.gpu.issue import Arrival, AtOnce, Events, Issued, Issuer
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout
from hybrimoe_plugin.device.streams import AHEAD, COMPUTE, LINK, REPACK, Event, Streams
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import Bytes, LayerWeights

AHEAD_DEPTH = 2
"""Prefetches given to the device at once. Copies share one engine that serves them in the order of
their arrival, whatever their streams' priorities: a demand load waits for every prefetch before it.
Two keep the link busy, one crossing it while the next is ready.
"""

LANDINGS = 4
"""Buffers in which matrices arrive that are to be split."""


class Transfer(NamedTuple):
    """One expert on its way into one slot."""

    slot: int
    layout: SlotLayout
    weights: LayerWeights
    expert: int

    @property
    def parts(self) -> tuple[tuple[Part, Bytes], ...]:
        """Gate, up and down: where each goes in the slot, and its stored bytes."""
        stored = (matrix.experts[self.expert] for matrix in self.weights.matrices())
        return tuple(zip(self.layout, stored, strict=True))


class SlotLane:
    """The slots' traffic on one device.

    Attributes:
        held: slot -> the transfer that fills it, once the device has been given all of it.
        cancelled: prefetches that were superseded before they crossed the link.

    Args:
        streams: the device's queues.
        kernels: split planes on arrival.
        host: where bytes are read from.
        buffer: [slots, slot bytes] uint8 on the device.
        landing_bytes: of the largest matrix that is split, 0 for none.
        ahead_depth: most prefetches that the device is given at once.
        issuer: gives transfers to the device; the lane closes it.
    """

    def __init__(
        self,
        streams: Streams,
        kernels: Kernels,
        host: HostBytes,
        buffer: torch.Tensor,
        landing_bytes: int,
        ahead_depth: int = AHEAD_DEPTH,
        issuer: Issuer | None = None,
    ) -> None:
        self._streams = streams
        self._kernels = kernels
        self._host = host
        self._buffer = buffer
        self._ahead_depth = ahead_depth
        self._issuer = issuer or AtOnce()
        count = LANDINGS if landing_bytes else 0
        self._landings = [
            torch.empty(landing_bytes, dtype=torch.uint8, device=buffer.device)
            for _ in range(count)
        ]
        self._landed: list[Event | None] = [None] * count
        self._turn = 0
        self._pending: dict[int, Transfer] = {}
        """Prefetches that the device has not been given, oldest first."""
        self._outstanding: deque[Arrival] = deque()
        """Prefetches that the device has been given and that have not crossed the link, oldest
        first.
        """
        self._gate_up: dict[int, Arrival] = {}
        self._down: dict[int, Arrival] = {}
        """Slot -> what compute has not waited for yet."""
        self._last_use: dict[int, Event] = {}
        self.held: dict[int, Transfer] = {}
        self.cancelled = 0
        # Memory that compute gave back a moment ago may still be read there: nothing is written
        # before that is over.
        streams.synchronize()

    def send(self, transfer: Transfer, ahead: bool = False) -> None:
        """Fill a slot; `ahead` for a prefetch, which may wait and be superseded."""
        self.held.pop(transfer.slot, None)
        self.cancel(transfer.slot)
        if ahead:
            self._pending[transfer.slot] = transfer
            self.pump()
        else:
            self._issue(transfer, LINK)

    def cancel(self, slot: int) -> bool:
        """Drop the slot's transfer if the device has not been given it; then the slot holds
        nothing.
        """
        if self._pending.pop(slot, None) is None:
            return False
        self.cancelled += 1
        return True

    def pump(self) -> None:
        """Give the device as many waiting prefetches as it should have."""
        while self._outstanding and self._reached(self._outstanding[0]):
            self._outstanding.popleft()
        while self._pending and len(self._outstanding) < self._ahead_depth:
            self._issue(self._pending.pop(next(iter(self._pending))), AHEAD)
            self._outstanding.append(self._issuer.submit(lambda: (self._streams.record(AHEAD),)))

    def wait_gate_up(self, slots: Iterable[int]) -> None:
        """Compute goes on only when these slots' gate and up have arrived.

        Raises:
            BackendError: a slot was never filled, its transfer was cancelled, or any transfer has
                failed.
        """
        for slot in slots:
            if slot in self._pending:  # needed now: it goes before the other prefetches
                self._issue(self._pending.pop(slot), LINK)
            elif slot not in self.held:
                raise BackendError(f"slot {slot} was never onloaded")
        self._wait(self._gate_up, slots)  # edge: gate and up have arrived -> stage 1

    def wait_down(self, slots: Iterable[int]) -> None:
        """The same for down. Raises: BackendError: any transfer has failed."""
        self._wait(self._down, slots)  # edge: down has arrived -> stage 2

    def used(self, slots: Sequence[int]) -> None:
        """Everything queued for compute so far is these slots' last use."""
        event = self._streams.record(COMPUTE)
        for slot in slots:
            self._last_use[slot] = event

    def settle(self) -> None:
        """After a call that did not end: wait for what was issued, forget what was not, and keep
        what is certain.

        The host waits for the device, so that no edge to older work is needed from then on.

        Mutates: `held`, which then lists only slots whose bytes have arrived.
        """
        self._pending.clear()
        self._issuer.drain()
        self._streams.synchronize()
        for arrivals in (self._gate_up, self._down):
            for slot in [slot for slot, arrival in arrivals.items() if _failed(arrival)]:
                self.held.pop(slot, None)
        self._issuer.forget()
        for known in (self._outstanding, self._gate_up, self._down, self._last_use):
            known.clear()
        self._landed = [None] * len(self._landed)

    def holds(self, slot: int, weights: LayerWeights, expert: int) -> bool:
        """Whether a slot has an expert's bytes as the file has them, or waits for them.

        The host must have waited for the device.
        """
        transfer = self._pending.get(slot) or self.held.get(slot)
        if transfer is None or transfer.weights is not weights or transfer.expert != expert:
            return False
        return slot in self._pending or not self._differs(slot)

    def drain(self) -> None:
        """The device has been given everything that it is to have by now; `synchronize` of its
        queues may follow.
        """
        self._issuer.drain()

    def check(self) -> None:
        """Raises: BackendError: a transfer has failed."""
        self._issuer.check()

    def close(self) -> None:
        """As `drain`; nothing can be sent any more."""
        self._issuer.close()

    def _differs(self, slot: int) -> bool:
        for part, stored in self.held[slot].parts:
            found = self._buffer[slot, part.offset : part.offset + part.size]
            raw = wanted = torch.from_numpy(stored.copy()).to(found.device)
            if part.split:
                wanted = torch.empty_like(found)
                self._kernels.repack(part, raw, wanted)
            if not torch.equal(found, wanted):
                return True
        return False

    def _wait(self, arrivals: dict[int, Arrival], slots: Iterable[int]) -> None:
        self._issuer.check()
        for slot in slots:
            if slot in arrivals:
                for event in arrivals[slot].result():
                    self._streams.wait(COMPUTE, event)
                del arrivals[slot]  # only now: an interrupted wait must come again

    def _reached(self, arrival: Arrival) -> bool:
        return arrival.done() and all(self._streams.reached(event) for event in arrival.result())

    def _issue(self, transfer: Transfer, queue: str) -> None:
        slot = transfer.slot
        # Whatever writes this slot now comes after its last use and after an older transfer that
        # nobody waited for. That one has been issued when this one is: jobs keep their order.
        older = [arrivals.pop(slot) for arrivals in (self._gate_up, self._down) if slot in arrivals]
        if slot in self._last_use:
            older.append(Issued((self._last_use.pop(slot),)))
        ordered: set[str] = set()
        gate, up, down = transfer.parts
        self._gate_up[slot] = self._issuer.submit(
            lambda: self._write(slot, queue, (gate, up), older, ordered)
        )
        self._down[slot] = self._issuer.submit(
            lambda: self._write(slot, queue, (down,), older, ordered)
        )
        self.held[slot] = transfer

    def _write(
        self,
        slot: int,
        queue: str,
        parts: Sequence[tuple[Part, Bytes]],
        older: Sequence[Arrival],
        ordered: set[str],
    ) -> Events:
        """Send some matrices; gives the last event of each queue that writes them."""
        writers = []
        for part, stored in parts:
            writer = REPACK if part.split else queue
            if writer not in ordered:
                ordered.add(writer)
                for event in (event for arrival in older for event in arrival.result()):
                    self._streams.wait(
                        writer, event
                    )  # edge: last use of the slot -> its next content
            target = self._buffer[slot, part.offset : part.offset + part.size]
            if part.split:
                self._land(queue, part, stored, target)
            else:
                self._copy(queue, stored, target)
            if writer not in writers:
                writers.append(writer)
        return tuple(self._streams.record(writer) for writer in writers)

    def _copy(self, queue: str, stored: Bytes, target: torch.Tensor) -> None:
        source = self._host.source(stored)
        self._streams.run(queue, lambda: _copy_now(source, target))
        if self._host.reuses:
            self._host.sent(self._streams.record(queue))

    def _land(self, queue: str, part: Part, stored: Bytes, target: torch.Tensor) -> None:
        """Copy into a landing buffer, and split from there into the slot."""
        turn, self._turn = self._turn, (self._turn + 1) % LANDINGS
        landing, free = self._landings[turn][: part.size], self._landed[turn]
        if free is not None:
            self._streams.wait(queue, free)  # edge: last split of this buffer -> next landing
        self._copy(queue, stored, landing)
        self._streams.wait(REPACK, self._streams.record(queue))  # edge: landed -> split
        self._streams.run(REPACK, lambda: self._kernels.repack(part, landing, target))
        self._landed[turn] = self._streams.record(REPACK)


def _failed(arrival: Arrival) -> bool:
    try:
        arrival.result()
    except BackendError:
        return True
    return False


def _copy_now(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
