"""The line that says what limited a run, from made-up calls and from an emulated accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import build, run

from hybrimoe_plugin.engine.run_limits import RunLimits
from hybrimoe_plugin.engine.timeline import Timeline
from hybrimoe_plugin.policy.schedule import Simulation, Slice


def call(*slices: tuple[str, float, float]) -> Simulation:
    """A call in the machine model, from (lane, start, end)."""
    pieces = tuple(Slice(lane, 0, start, end) for lane, start, end in slices)
    return Simulation(max(piece.end_us for piece in pieces), 0.0, 0.0, 0.0, pieces)


CALLS = {
    "link": call(("link", 0, 80), ("accelerator", 80, 100), ("cpu", 0, 50)),
    "cpu": call(("cpu", 0, 100), ("accelerator", 0, 60)),
    "accelerator": call(("accelerator", 0, 100), ("link", 0, 30), ("cpu", 0, 90)),
}


@pytest.mark.parametrize(("limit", "name"), [(key, key) for key in CALLS])
def test_each_limit_is_found(limit: str, name: str) -> None:
    limits = RunLimits()
    for layer in range(4):
        # Measured to take twice the planned time, with a short gap between the calls.
        limits.add(layer, layer * 210.0, 200.0, CALLS[limit])
    shares = limits.shares()
    assert max(shares, key=lambda key: shares[key]) == name
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["host"] == pytest.approx(30 / 830)
    if limit == "link":
        assert shares["link"] == pytest.approx(4 * 160 / 830)
        assert limits.text().startswith("limited by the link for 77% of the time, ")
        assert limits.text().endswith("(busy: CPU 48%, accelerator 19%, link 77%)")


def test_what_lies_between_the_calls_is_the_host_s() -> None:
    limits = RunLimits()
    limits.add(0, 0.0, 100.0, CALLS["cpu"])
    limits.add(1, 900.0, 100.0, CALLS["cpu"])
    assert limits.shares()["host"] == pytest.approx(0.8)


def test_a_pause_before_the_next_question_is_nobody_s() -> None:
    limits = RunLimits()
    limits.add(0, 0.0, 100.0, CALLS["cpu"])
    limits.add(0, 60e6, 100.0, CALLS["cpu"])
    assert limits.shares()["host"] == 0.0


def test_no_call_is_said_in_words(tmp_path: Path) -> None:
    with Timeline(tmp_path / "t.json") as timeline:
        pass
    assert timeline.summary().startswith("no layer call was recorded; written to ")


def test_loading_every_miss_is_limited_by_the_link(tmp_path: Path) -> None:
    """On the emulated accelerator, where a transfer takes longer than computing an expert."""
    engine, routers = build(cache_ratio=0.25, scheduler="accelerator_only", prefetch="off")
    engine.controller.costs.between_layers_us = 1.0
    engine.controller.costs.transfer_us *= 50
    with Timeline(tmp_path / "t.json") as timeline:
        engine.timeline = timeline
        for seed in range(3):
            run(engine, routers, 3, seed)
    said = timeline.summary()
    assert said.startswith("emulated times: limited by the link for ")
    assert said.endswith(f"written to {timeline.path} (open it in https://ui.perfetto.dev)")
