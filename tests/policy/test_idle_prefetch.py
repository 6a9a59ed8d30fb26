"""Prefetches in idle link time: weighed by what they gain, and doubtful ones only on credit."""

from __future__ import annotations

import numpy as np
import tiny_experts
from controllers import begin, make_controller, nobody_wants, routed

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.prefetch import Prediction, PrefetchRequest
from hybrimoe_plugin.policy.prefetch.record import CREDIT, USED_SHARE
from hybrimoe_plugin.policy.step import IdleTime, Move
from hybrimoe_plugin.policy.transfer_gain import TransferGain, with_arrival


def spare_moves(
    worth: float,
    transfer_us: float = 300.0,
    issued: float = 0.0,
    accelerator_us: float = 600.0,
    hits: int = 50,
) -> list[tuple[int, int]]:
    """What is prefetched for layer 1 when it is predicted to need expert 7 alone.

    The CPU would compute that expert as fast.
    """
    made = make_controller(2, transfer_us, accelerator_us, prefetch="expected")
    made.prefetch_record.issued = issued
    made.warm_start()
    assert made.pool.slot_of(1, 7) is None
    step = begin(made, 0, [0, 1], 1, 0.0)
    made.note(step)
    confidence = made.idle_prefetch.confidence
    for turn in range(50):
        confidence.predicted(1, 1, routed(7), many=False)
        true = turn * hits // 50 < (turn + 1) * hits // 50
        confidence.check(1, routed(7) if true else ())
    held = made.residency.worth
    held[held < np.inf] = worth
    moves = made.look_ahead(step, [(1, {7: 1})], 0.0)
    return [(move.layer, move.expert) for move in moves if move.layer == 1]


def test_spare_time_sends_what_the_cpu_would_hide() -> None:
    assert spare_moves(worth=0.1) == [(1, 7)]


def test_spare_time_takes_no_slot_that_may_be_needed() -> None:
    assert spare_moves(worth=0.6) == []


def test_there_is_no_spare_time_on_a_busy_link() -> None:
    assert spare_moves(worth=0.1, transfer_us=5000.0) == []


def test_doubtful_ones_wait_while_prefetches_stay_unused() -> None:
    limit = CREDIT / USED_SHARE
    assert spare_moves(worth=0.1, issued=limit - 0.1, hits=25) == [(1, 7)]
    assert spare_moves(worth=0.1, issued=limit + 0.1, hits=25) == []


def test_sure_ones_need_not_wait_but_must_be_the_surer_the_fewer_were_used() -> None:
    limit = CREDIT / USED_SHARE
    assert spare_moves(worth=0.1, issued=limit + 0.1) == [(1, 7)]
    assert spare_moves(worth=0.1, issued=50.0) == []


def busy_controller() -> tuple[Controller, TransferGain]:
    """A slow link that no call is known to want, and layers of 1 ms."""
    made = make_controller(2, 2000.0, prefetch="expected")
    made.link.note_layer(1000.0)
    costs = tiny_experts.costs(transfer_us=2000.0)
    gain = TransferGain(made.residency, made.link, made.schedulers, costs, calibrated=True)
    return made, gain


def sure(layer: int, needed: dict[int, int]) -> Prediction:
    """A prediction of offloaded experts that is certain to come true."""
    items = tuple(Routed(expert, load, OFFLOADED) for expert, load in needed.items())
    return Prediction(layer, layer, items, dict.fromkeys(needed, 1.0))


def late_gain_us(behind: dict[int, int]) -> float:
    """Gain of a sure prefetch for layer 1 that ends after layer 1, if layer 2 needs `behind`."""
    made, gain = busy_controller()
    step = made.begin(0, {}, 4, 0.0)
    nobody_wants(made.link)
    ahead = [sure(1, {7: 1}), sure(2, behind)]
    request = PrefetchRequest(ExpertRef(1, 7), 1, 1000.0, 1.0)
    return gain.prefetch_us(step, ahead, IdleTime(0.0, 500.0), request)


def test_a_late_prefetch_pays_for_the_layer_behind_its_own() -> None:
    assert late_gain_us({0: 1}) > late_gain_us({0: 64})


def test_the_second_prefetch_is_weighed_beside_the_first() -> None:
    """With the first of two equal misses under way their layer is done sooner.

    So the layer behind wants the link.
    """
    made, gain = busy_controller()
    step = made.begin(0, {}, 4, 0.0)
    nobody_wants(made.link)
    made.link.free_us = 2000.0
    idle = IdleTime(0.0, 1500.0)
    ahead = sure(1, {6: 4, 7: 4})
    behind = sure(2, {0: 64})
    first = Move(1, 6, 0, 0.0, 2000.0)
    ready_us = first.end_us - made.link.layer_start_us(1, idle)
    coming = ahead._replace(routed=tuple(with_arrival(ahead.routed, 6, ready_us)))
    assert [item.ready_us for item in coming.routed] == [500.0, OFFLOADED]
    request = PrefetchRequest(ExpertRef(1, 7), 1, 100.0, 1.0)
    beside = gain.prefetch_us(step, [coming, behind], idle, request)
    alone = gain.prefetch_us(step, [ahead, behind], idle, request)
    assert beside < alone


def test_predictions_know_what_was_sent() -> None:
    """What is sent arrives in the predictions that later transfers are weighed by."""
    made = make_controller(2, 300.0, prefetch="impact")
    made.warm_start()
    step = begin(made, 0, [0, 1], 1, 0.0)
    made.note(step)
    idle = IdleTime(0.0, 10_000.0)
    predictions = made.idle_prefetch.predict(step, [(1, {6: 4, 7: 4})], idle)
    moves = made.idle_prefetch.send(step, predictions, idle)
    assert moves
    sent = {move.expert for move in moves}
    for item in predictions[0].routed:
        assert (item.ready_us == 0.0) == (item.expert in sent)
