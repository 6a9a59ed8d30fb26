"""Prefetching: by impact, within the link's idle time, and only what helps."""

from __future__ import annotations

import tiny_experts

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.policy.prefetch import (
    ImpactPrefetcher,
    Prediction,
    ScorePrefetcher,
    make_prefetcher,
)
from hybrimoe_plugin.policy.schedule import HybriMoEScheduler

COSTS = tiny_experts.costs(cpu_us=1000, transfer_us=300)
SCHEDULER = HybriMoEScheduler(COSTS)


def prediction(layer: int, *states: tuple[int, float]) -> Prediction:
    routed = tuple(Routed(e, load, ready) for e, (load, ready) in enumerate(states))
    return Prediction(layer, layer, routed, dict.fromkeys(range(len(states)), 1.0))


def test_the_first_choice_has_the_highest_impact_of_all() -> None:
    predictions = [
        prediction(1, (1, 0.0), (1, OFFLOADED)),
        prediction(2, (1, OFFLOADED), (6, OFFLOADED), (2, 0.0)),
        prediction(3, (3, OFFLOADED), (1, 0.0)),
    ]
    impacts = {}
    for item in predictions:
        before = SCHEDULER.plan(item.routed).makespan_us
        for index, routed in enumerate(item.routed):
            if routed.ready_us == OFFLOADED:
                there = list(item.routed)
                there[index] = routed._replace(ready_us=0.0)
                impacts[ExpertRef(item.layer, routed.expert)] = (
                    before - SCHEDULER.plan(there).makespan_us
                )
    first = ImpactPrefetcher(SCHEDULER).choose(predictions, 9)[0]
    assert first.impact_us == max(impacts.values())
    assert impacts[first.ref] == first.impact_us


def test_no_more_than_there_is_room_for() -> None:
    predictions = [prediction(1, *[(1, OFFLOADED)] * 8)]
    for room, found in ((0, 0), (1, 1), (3, 3), (7, 7)):
        for prefetcher in (ImpactPrefetcher(SCHEDULER), ScorePrefetcher()):
            assert len(prefetcher.choose(predictions, room)) == found


def test_nothing_that_does_not_help() -> None:
    resident = [prediction(1, (1, 0.0), (2, 0.0))]
    assert ImpactPrefetcher(SCHEDULER).choose(resident, 9) == []
    # The CPU computes the miss while the accelerator is busy for longer with what it has.
    hidden = tiny_experts.costs(cpu_us=10, first_us=0, accelerator_us=2000, transfer_us=300)
    scheduler = HybriMoEScheduler(hidden)
    calm = [prediction(1, (1, OFFLOADED))]
    assert ImpactPrefetcher(scheduler).choose(calm, 9) == []


def test_score_takes_the_nearest_layer_and_heaviest_load_first() -> None:
    chosen = ScorePrefetcher().choose(
        [prediction(1, (1, OFFLOADED), (5, OFFLOADED)), prediction(2, (9, OFFLOADED))], 3
    )
    assert [request.ref for request in chosen] == [
        ExpertRef(1, 1),
        ExpertRef(1, 0),
        ExpertRef(2, 0),
    ]


def test_off_is_none() -> None:
    assert make_prefetcher("off", SCHEDULER) is None


def test_calibrated_impact_weighs_by_confidence_and_the_published_one_does_not() -> None:
    near = prediction(1, (1, OFFLOADED), (1, 0.0))._replace(confidence={0: 0.2, 1: 1.0})
    far = prediction(2, (1, OFFLOADED), (1, 0.0))._replace(confidence={0: 0.9, 1: 1.0})
    published = ImpactPrefetcher(SCHEDULER).choose([near, far], 2)
    calibrated = ImpactPrefetcher(SCHEDULER, calibrated=True).choose([near, far], 2)
    assert [request.ref.layer for request in published] == [1, 2]
    assert [request.confidence for request in published] == [1.0, 1.0]
    assert [request.ref.layer for request in calibrated] == [2, 1]
    assert [request.confidence for request in calibrated] == [0.9, 0.2]
    assert len(ImpactPrefetcher(SCHEDULER, calibrated=True).choose([near, far], 2, floor=0.5)) == 1


def test_the_worked_example() -> None:
    """As in the docstring of `prefetch/impact.py`: experts A, B, C, and D of the layer behind."""
    cpu, accelerator = CostCurve((1, 2), (20.0, 40.0)), CostCurve((1,), (10.0,))
    scheduler = HybriMoEScheduler(CostModel(cpu, 0.0, accelerator, 0.0, 40.0))
    near = prediction(1, (4, 0.0), (3, OFFLOADED), (1, OFFLOADED))
    far = prediction(2, (1, OFFLOADED))
    chosen = ImpactPrefetcher(scheduler).choose([near, far], 9)
    assert [(request.ref, request.impact_us) for request in chosen] == [
        (ExpertRef(1, 1), 30.0),
        (ExpertRef(2, 0), 10.0),
    ]
