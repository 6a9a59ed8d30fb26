"""What became of prefetches: each is used, wasted or withdrawn once."""

from __future__ import annotations

import pytest
from controllers import routed

from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.prefetch.record import DOUBTFUL, SLACK, PrefetchRecord

ONE, TWO, THREE = ExpertRef(1, 4), ExpertRef(1, 5), ExpertRef(2, 4)


def sent() -> tuple[PrefetchRecord, Counters]:
    counters = Counters()
    record = PrefetchRecord(counters)
    for ref in (ONE, TWO):
        record.send(ref, distance=1, decode=True)
    record.send(THREE, distance=2, decode=True)
    return record, counters


def test_each_is_counted_once() -> None:
    record, counters = sent()
    for _ in range(2):
        record.use(ONE)
        record.evict(TWO)
    record.withdraw(THREE)
    assert counters.prefetches == 2, "the withdrawn one was never sent"
    assert counters.prefetches_used == 1
    assert counters.prefetches_wasted == 1
    assert record.by_distance == {1: [2, 1], 2: [0, 0]}


def test_unused_ones_are_known_until_their_layer_needs_them() -> None:
    record, _ = sent()
    assert ONE in record
    record.use_all(ONE.layer, routed(ONE.expert))
    assert ONE in record, "offloaded: the prefetch is not what brought it"
    record.use_all(ONE.layer, routed(ONE.expert, 7, ready_us=0.0))
    record.use_all(TWO.layer + 1, routed(TWO.expert, ready_us=0.0))
    assert ONE not in record
    assert TWO in record


def test_the_fewer_were_used_the_surer_the_next_must_be() -> None:
    record = PrefetchRecord(Counters())
    assert record.least_confidence(credit=1.0) == SLACK
    floors = []
    for expert in range(40):
        record.send(ExpertRef(0, expert), distance=1, decode=True)
        floors.append(record.least_confidence())
    assert floors == sorted(floors)
    assert floors[0] == DOUBTFUL
    for expert in range(40):
        record.use(ExpertRef(0, expert))
    assert record.least_confidence() == SLACK


def test_prompts_do_not_count_for_decode() -> None:
    record = PrefetchRecord(Counters())
    record.send(ONE, distance=1, decode=False)
    record.use(ONE)
    assert record.issued == record.used == pytest.approx(0.0)
