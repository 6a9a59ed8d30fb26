"""Busy shares over a window of time."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.core import LayerPlan
from hybrimoe_plugin.policy.step import Computed, Move, Step
from hybrimoe_plugin.serve.live.lanes import PIECES, Lanes

PIECE_US = 10.0
WINDOW_US = PIECES * PIECE_US


def call(
    start_us: float, spent_us: float, cpu: float, accelerator: float, *ahead: Move
) -> Computed:
    """A call whose plan gives each side a share of the time."""
    plan = LayerPlan((0,), (1,), (), 1.0, cpu, accelerator, 0.0)
    return Computed(Step(0, 1, (), plan, ()), ahead, start_us, spent_us)


def test_a_call_fills_the_pieces_that_it_covers() -> None:
    lanes = Lanes(WINDOW_US)
    lanes.add([call(975.0, 20.0, 1.0, 0.25)], 999.0)
    cpu, accelerator, link = lanes.shares()
    np.testing.assert_allclose(cpu[-3:], [0.5, 1.0, 0.5])
    np.testing.assert_allclose(accelerator[-3:], [0.5, 0.0, 0.0])
    assert not link.any()


def test_all_time_is_counted_once() -> None:
    lanes = Lanes(WINDOW_US)
    calls = [call(7.0 * at, 5.0, 0.5, 1.0) for at in range(100)]
    for first in range(0, 100, 9):
        part = calls[first : first + 9]
        lanes.add(part, part[-1].start_us + part[-1].spent_us)
    cpu, accelerator, _ = lanes.shares()
    np.testing.assert_allclose([cpu.sum(), accelerator.sum()], [250 / PIECE_US, 500 / PIECE_US])


def test_what_is_older_than_the_window_leaves_it() -> None:
    lanes = Lanes(WINDOW_US)
    lanes.add([call(900.0, 50.0, 1.0, 1.0)], 999.0)
    lanes.add([], 999.0 + 0.92 * WINDOW_US)
    assert lanes.shares()[0].sum() == 3.0
    lanes.add([], 999.0 + 50 * WINDOW_US)
    assert not lanes.shares().any()


def test_a_transfer_that_is_yet_to_end_comes_into_the_window_with_time() -> None:
    lanes = Lanes(WINDOW_US)
    lanes.add([call(990.0, 5.0, 1.0, 1.0, Move(0, 0, 0, 995.0, 1025.0))], 999.0)
    assert lanes.shares()[2].sum() == 0.5
    lanes.add([], 1029.0)
    assert lanes.shares()[2].sum() == 3.0


def test_overlapping_calls_are_no_more_than_busy() -> None:
    lanes = Lanes(WINDOW_US)
    lanes.add([call(900.0, 50.0, 1.0, 1.0)] * 3, 999.0)
    assert lanes.shares().max() == 1.0


def test_a_call_longer_than_the_window_fills_it() -> None:
    lanes = Lanes(WINDOW_US)
    lanes.add([call(0.0, 5 * WINDOW_US, 1.0, 0.0)], 5 * WINDOW_US - 1)
    np.testing.assert_allclose(lanes.shares()[0], 1.0)
