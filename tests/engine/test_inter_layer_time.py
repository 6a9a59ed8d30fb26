"""The time between layers is the model's own, learned as it runs; simulated time has the
profile's.
"""

from __future__ import annotations

import engines
import pytest
import torch

from hybrimoe_plugin.engine import WallClock
from hybrimoe_plugin.engine.clock import InterLayerTime
from hybrimoe_plugin.policy.controller import Move


def test_only_neighbours_of_one_kind_are_compared() -> None:
    between = InterLayerTime()
    assert between.begin(0, 1, 100.0) is None
    between.end(0, 1, 130.0)
    assert between.begin(1, 1, 180.0) == 50.0
    between.end(1, 1, 200.0)
    assert between.begin(0, 1, 900.0) == 50.0, (
        "from the last layer to the first there is more than attention"
    )
    between.end(0, 1, 950.0)
    assert between.begin(1, 64, 990.0) is None, "a prompt's is another"
    between.end(1, 64, 2000.0)
    assert between.begin(2, 64, 2600.0) == 600.0
    between.end(2, 64, 3000.0)
    assert between.begin(3, 64, 2900.0) == pytest.approx(600.0 * 0.95), (
        "done before the plan's end: nothing between"
    )
    assert between.begin(4, 64, 9000.0) == pytest.approx(600.0 * 0.95), (
        "a call that was interrupted has no end"
    )


class Scripted(WallClock):
    """Real time by the tick: 10 us at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def now_us(self) -> float:
        self.now += 10.0
        return self.now


def test_the_engine_plans_with_it() -> None:
    engine, routers = engines.build(clock=Scripted(), cache_ratio=0.5)
    assert engine.controller.costs.between_layers_us == 500.0, "the profile's"
    waited = []
    look_ahead = engine.controller.look_ahead

    def note(*call: object) -> list[Move]:
        waited.append(engine.controller.costs.between_layers_us)
        return look_ahead(*call)  # type: ignore[arg-type]

    engine.controller.look_ahead = note  # type: ignore[method-assign]
    hidden = torch.randn(1, engines.HIDDEN)
    for layer in range(3):
        ids, weights = routers[layer].route(hidden)
        engine.run(layer, hidden, ids, weights)
        # Attention: until 700 us after the plan's end.
        assert engine._inter_layer is not None
        assert engine._inter_layer._last is not None
        engine.clock.now = engine._inter_layer._last.at_us + 690.0  # type: ignore[union-attr]
    assert waited[1:] == [pytest.approx(700.0)] * 2
    engine.close()


def test_simulated_time_keeps_the_profiles() -> None:
    engine, routers = engines.build(cache_ratio=0.5)
    before = engine.controller.costs.between_layers_us
    hidden = torch.randn(1, engines.HIDDEN)
    for layer in range(3):
        engine.run(layer, hidden, *routers[layer].route(hidden))
    assert engine.controller.costs.between_layers_us == before
    engine.close()
