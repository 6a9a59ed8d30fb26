"""The link's queue: one transfer after another, and what usually keeps it busy."""

from __future__ import annotations

import pytest
import tiny_experts

from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.link_time import LinkTime
from hybrimoe_plugin.policy.step import IdleTime


def make_link(transfer_us: float = 300.0) -> tuple[LinkTime, Counters]:
    counters = Counters()
    costs = tiny_experts.costs(transfer_us=transfer_us)
    return LinkTime(costs, counters, expert_bytes=100), counters


def test_transfers_follow_one_another() -> None:
    link, counters = make_link()
    first = link.send(0, 1, 5, now_us=50.0)
    second = link.send(0, 2, 6, now_us=60.0)
    late = link.send(1, 3, 7, now_us=1000.0)
    assert (first.start_us, first.end_us) == (50.0, 350.0)
    assert (second.start_us, second.end_us) == (350.0, 650.0)
    assert (late.start_us, late.end_us) == (1000.0, 1300.0)
    assert link.free_us == 1300.0
    assert counters.link_bytes == 300


def test_a_withdrawn_transfer_leaves_no_trace() -> None:
    link, counters = make_link()
    link.send(0, 1, 5, now_us=0.0)
    link.send(0, 2, 6, now_us=0.0)
    link.withdraw()
    assert link.free_us == 300.0
    assert counters.link_bytes == 100


@pytest.mark.parametrize(("busy_us", "room"), [(0.0, 5), (650.0, 3), (5000.0, 2)])
def test_room_is_what_fits_and_two_that_may_end_late(busy_us: float, room: int) -> None:
    link, _ = make_link()
    link.free_us = busy_us
    assert link.room(IdleTime(0.0, 1000.0)) == room


def test_no_link_has_no_room() -> None:
    link, _ = make_link(transfer_us=0.0)
    assert link.room(IdleTime(0.0, 1000.0)) == 0


def test_later_layers_start_one_layer_time_after_another() -> None:
    link, _ = make_link()
    link.note_layer(400.0)
    idle = IdleTime(0.0, 1000.0)
    starts = [link.layer_start_us(distance, idle) for distance in (1, 2, 3)]
    assert starts == [1000.0, 1400.0, 1800.0]


def test_averages_follow_what_is_seen() -> None:
    link, _ = make_link()
    for _ in range(1000):
        link.note_layer(200.0)
        link.note_call(many=False, demand=False)
    assert link.layer_us == pytest.approx(200.0)
    decode, prefill = link.demand_share
    assert decode == pytest.approx(0.0, abs=1e-6)
    assert prefill == 1.0, "of the other kind of call nothing is known"
