"""Calls with a miss, whatever their plans: drawn by lot, on a late device."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence as Many

import pytest
import tiny
from graphed import Loader, Sequence, cuda_layers_of
from late_device import late_device

from eval.models import tiny as tiny_models
from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.decode.chain.chain import LayerCall
from hybrimoe_plugin.engine import assemble, waves
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler

SEEDS = int(os.environ.get("HYBRIMOE_LONG", 6))
STEPS = 24


class AnyPlan(Scheduler):
    """Leaves any experts to the CPU, cached ones too, and loads any number of the others."""

    name = "any"

    def __init__(self, rng: random.Random, on_cpu: float) -> None:
        self._rng = rng
        self._on_cpu = on_cpu

    def plan(self, routed: Many[Routed], link_free_us: float = 0.0) -> LayerPlan:
        cpu, there, loaded = [], [], []
        for item in routed:
            if self._rng.random() < self._on_cpu:
                cpu.append(item.expert)
            elif item.ready_us == OFFLOADED:
                loaded.append(item.expert)
            else:
                there.append((item.ready_us, item.expert))
        in_slots = [expert for _, expert in sorted(there)]
        return LayerPlan(
            tuple(cpu), tuple(in_slots + loaded), tuple(loaded), 100.0, 50.0, 50.0, 50.0
        )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_tokens_are_the_plain_models(
    seed: int, load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few staging slots make several waves, which are joined or not; ties fall otherwise."""
    rng = random.Random(seed)
    family = rng.choice(("mixtral", "qwen2_moe", "qwen2_moe_norm"))
    monkeypatch.setitem(tiny_models._BASE, "num_hidden_layers", rng.choice((1, 2, 3)))
    plain = Sequence(tiny.model(family), 1)
    staging = rng.choice((2, 4))
    monkeypatch.setattr(assemble, "staging_slots", lambda slots: staging)
    monkeypatch.setattr(waves, "WAVE_US", rng.choice((0.0, 1e9)))
    missed, compute = 0, LayerCall.compute_missing

    def compute_missing(call: LayerCall) -> None:
        nonlocal missed
        missed += 1
        if call.whole and rng.random() < 0.2:  # as if it had been routed otherwise at first
            assert call.link is not None
            call.chosen = rng.sample(range(call.link.table.rows.shape[1]), len(call.chosen))
        compute(call)

    monkeypatch.setattr(LayerCall, "compute_missing", compute_missing)
    with late_device(monkeypatch, seed) as capture:
        choices = {"cache_ratio": rng.choice((0.3, 0.6)), "budget": rng.choice(("shared", "layer"))}
        model = load_captured(family, capture, **choices)
        (engine,) = model.hybrimoe.engines
        engine.controller.schedulers.decode = AnyPlan(rng, rng.choice((0.0, 0.3)))
        for layer in cuda_layers_of(model):
            assert layer._link is not None and layer.chain is not None
            layer._link.sure = rng.choice((0.0, 2.0))
        ours = Sequence(model, 1)
        for _ in range(STEPS):
            ours.step()
            plain.step()
        assert ours.tokens == plain.tokens
        assert missed
        assert all(layer.chain and layer.chain.proven for layer in cuda_layers_of(model))
        model.hybrimoe.check_integrity()
