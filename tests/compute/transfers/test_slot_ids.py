"""Slot ids in pinned memory that is used again: a device that is late reads what it was sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_streams import Point
from interrupts import ended, operations
from late_device import InOrder, LateStreams

from hybrimoe_plugin.compute.gpu.slot_ids import HALF, SlotIds, SlotIdSenders
from hybrimoe_plugin.device.streams import COMPUTE, HostStreams

CPU = torch.device("cpu")
WAVES, TOP_K = 2, 3
SHAPE = WAVES, 1, TOP_K
COUNT = 5 * HALF + 3


class NeverBefore(LateStreams):
    """Runs nothing before the host waits for it."""

    def reached(self, event: Point) -> bool:
        return event.done


def numbers(turn: int) -> list[int]:
    return [turn * 100 + place - 1 for place in range(WAVES * TOP_K)]


def send(streams: LateStreams, ids: SlotIds, turn: int, found: list[list[int]]) -> None:
    """Send numbers; a kernel behind it reads them."""
    rows = ids.send(numbers(turn))
    assert [tuple(row.shape) for row in rows] == [(1, TOP_K)] * WAVES
    streams.enqueue(COMPUTE, lambda: found.append(torch.cat(rows).flatten().tolist()))


def read_late(streams: LateStreams, prompt: bool = False) -> list[list[int]]:
    """What the kernels read.

    Args:
        prompt: let the device run everything after each of them.
    """
    found: list[list[int]] = []
    with InOrder(streams):
        ids = SlotIds(streams, CPU, SHAPE)
        for turn in range(COUNT):
            send(streams, ids, turn, found)
            if prompt:
                streams.run_compute()
        streams.synchronize()
    return found


def test_a_late_device_reads_what_it_was_sent() -> None:
    streams = NeverBefore(0)
    assert read_late(streams) == [numbers(turn) for turn in range(COUNT)]
    assert streams.host_waits == COUNT // HALF - 1, "once for each half that is written again"


def test_the_host_does_not_wait_for_a_device_that_keeps_up() -> None:
    streams = NeverBefore(0)
    assert read_late(streams, prompt=True) == [numbers(turn) for turn in range(COUNT)]
    assert streams.host_waits == 0


def test_memory_that_is_written_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own test."""
    streams = NeverBefore(0)
    monkeypatch.setattr(streams, "reached", lambda event: True)
    assert read_late(streams) != [numbers(turn) for turn in range(COUNT)]


def test_without_a_device_they_are_there_at_once() -> None:
    ids = SlotIds(HostStreams(), CPU, SHAPE)
    for turn in range(COUNT):
        assert torch.cat(ids.send(numbers(turn))).flatten().tolist() == numbers(turn)


def test_a_late_device_reads_what_it_was_sent_for_a_few_rows() -> None:
    """Calls of three and of four tokens share a sender."""
    streams = NeverBefore(0)
    found: list[list[list[list[int]]]] = []
    sent = []
    with InOrder(streams):
        senders = SlotIdSenders(streams, CPU)
        for turn in range(COUNT):
            tokens = 3 + turn % 2
            ids = turn * 100 + np.arange(WAVES * tokens * TOP_K).reshape(WAVES, tokens, TOP_K)
            sent.append(ids.tolist())
            rows = senders.of(*ids.shape).send_table(ids)
            streams.enqueue(COMPUTE, lambda rows=rows: found.append(torch.stack(rows).tolist()))
        streams.synchronize()
    assert found == sent
    assert streams.host_waits == COUNT // HALF - 1


@pytest.mark.parametrize("turn", [0, 1, HALF, 2 * HALF])
def test_whatever_is_interrupted_the_next_ones_are_read_as_they_were_sent(turn: int) -> None:
    """Also where the device is as late as it may be behind the interrupt."""

    def begun(streams: LateStreams, found: list[list[int]]) -> SlotIds:
        ids = SlotIds(streams, CPU, SHAPE)
        for before in range(turn):
            send(streams, ids, before, found)
        return ids

    streams = NeverBefore(0)
    with InOrder(streams):
        ids = begun(streams, [])
        count = operations(lambda: ids.send(numbers(turn)))
    for place in range(1, count + 1):
        streams, found = NeverBefore(0), []
        with InOrder(streams):
            ids = begun(streams, found)
            ended(lambda ids=ids: ids.send(numbers(-1)), place, KeyboardInterrupt())  # type: ignore[misc]
            for number in range(turn, COUNT):
                send(streams, ids, number, found)
            streams.synchronize()
        assert found == [numbers(number) for number in range(COUNT)], place
