"""Long prompts stream layers through the staging slots; the same engine on Triton kernels gives the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_experts
import torch
from engines import EXPERTS, HIDDEN, WEIGHTS, build, plain, run
from kernel_cases import random_layer

from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.policy.schedule import make_scheduler


@pytest.mark.parametrize("transfer_us", [20.0, 300.0, 3000.0])
def test_a_long_prompts_plan_is_no_slower_than_either_side_alone(transfer_us: float) -> None:
    """A quarter resident, 200 tokens an expert: streamed over a fast link, left to the CPU over a
    slow one.
    """
    costs = tiny_experts.costs(transfer_us=transfer_us)
    routed = [
        Routed(expert, 200 + expert, 0.0 if expert % 4 == 0 else OFFLOADED) for expert in range(64)
    ]
    plans = {
        name: make_scheduler(name, costs, True).plan(routed) for name in ("hybrimoe", "cpu_only")
    }
    plans["stream"] = make_scheduler("accelerator_only", costs, True).plan(routed)
    ours = plans["hybrimoe"]
    assert ours.makespan_us <= min(plans["cpu_only"].makespan_us, plans["stream"].makespan_us)
    if transfer_us == 20.0:
        assert len(ours.onload) > 40, "a fast link streams nearly all that is missing"


def test_a_wave_is_sent_before_the_one_before_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, routers = build(cache_ratio=0.0, scheduler="accelerator_only", prefetch="off")
    events: list[tuple[str, tuple[int, ...]]] = []
    real_onload = engine.accelerator.onload
    real_compute = engine.accelerator.compute

    def onload(slot: int, *args: Any, **named: Any) -> None:
        events.append(("send", (slot,)))
        real_onload(slot, *args, **named)

    def compute(slots: Sequence[int], *args: Any) -> torch.Tensor:
        events.append(("compute", tuple(slots)))
        return real_compute(slots, *args)

    monkeypatch.setattr(engine.accelerator, "onload", onload)
    monkeypatch.setattr(engine.accelerator, "compute", compute)
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0))
    ids, routing = routers[0].route(hidden)
    assert len(ids.unique()) == EXPERTS
    torch.testing.assert_close(
        engine.run(0, hidden, ids, routing), plain(WEIGHTS[0], hidden, ids, routing)
    )
    kinds = [kind for kind, _ in events]
    assert kinds == ["send"] * 4 + ["compute", "send", "send"] * 2 + ["compute"] * 2
    sent: list[int] = []
    for kind, slots in events:
        if kind == "send":
            sent += slots
        else:  # each slot is computed before it is sent to again
            assert [sent.pop(sent.index(slot)) for slot in slots] == list(slots)
            assert not set(slots) & set(sent)


def test_the_engine_on_triton_kernels() -> None:
    pytest.importorskip("triton")
    weights = [random_layer(kinds, 64, 64, 4, index=index) for index, kinds in enumerate(
        [("Q8_0", "Q8_0", "Q4_0"), ("Q4_0", "Q8_0", "F16")])]  # fmt: skip
    device = make_accelerator(
        "cuda" if torch.cuda.is_available() else "emulated", torch.device("cuda:0"), "triton"
    )
    engine, routers = build(device, weights, cache_ratio=0.5, scheduler="hybrimoe")
    assert engine.accelerator.kernels.name == "triton"
    for seed, tokens in enumerate((1, 1, 10)):
        run(engine, routers, tokens, seed, rtol=1e-4, atol=1e-5)
    assert engine.controller.counters.experts_accelerator > 0


def test_a_prompts_waves_together_and_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tiles, rows and one sum give what slot ids for each wave, added up, give."""
    pytest.importorskip("triton")
    weights = [random_layer(("Q8_0", "Q8_0", "Q4_0"), 64, 64, EXPERTS)]
    hidden = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    found, waves = [], []
    for together in (True, False):
        device = make_accelerator("emulated", torch.device("cpu"), "triton")
        assert device is not None
        real = device.prompt_call

        def noted(
            layer: Any, given: Any, *args: Any, real: Any = real, give: bool = together
        ) -> Any:
            waves.append(given)
            return real(layer, given, *args) if give else None

        monkeypatch.setattr(device, "prompt_call", noted)
        engine, (router,) = build(device, weights, cache_ratio=0.25, scheduler="accelerator_only")
        found.append(engine.run(0, hidden, *router.route(hidden)))
    assert waves[0] == waves[1]
    assert len(waves[0]) > 2
    torch.testing.assert_close(*found)
