"""Cache fills: misses that the CPU computed are brought in while the link is idle."""

from __future__ import annotations

from controllers import LAYERS, begin, make_controller

from hybrimoe_plugin.policy.step import IdleTime


def test_decode_makes_up_for_fills_that_a_prompt_had_no_time_for() -> None:
    made = make_controller(2, prefetch="off")
    made.warm_start()
    now_us = 0.0
    for layer in range(LAYERS):
        made.link.free_us = now_us + 1e6
        step = begin(made, layer, [4, 5], 3, now_us)
        made.look_ahead(step, [], now_us)
        made.finish(step)
        now_us += 100.0
    fill = made.cache_fill
    assert fill.postponed == {layer: [4, 5] for layer in range(LAYERS)}
    made.link.free_us = now_us
    step = made.begin(0, {0: 1}, 1, now_us)
    made.note(step)
    moves = fill.make_up(step, 1, IdleTime(now_us, now_us + 350.0))
    assert [(move.layer, move.expert) for move in moves] == [(1, 5)], "what fits, best first"
    assert fill.postponed[1] == [4]
