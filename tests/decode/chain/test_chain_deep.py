"""Chains of more layers than may be launched ahead."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
from graphed import Loader, Sequence, cuda_layers_of
from late_device import late_device
from replayed import Replayed

from eval.models import tiny as tiny_models
from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.decode.batch import connect
from hybrimoe_plugin.decode.chain.proof import ProvenChain
from hybrimoe_plugin.decode.cuda_layer import CudaLayer
from hybrimoe_plugin.policy.controller import Controller

STEPS = 40
DEPTH = 6


@pytest.mark.parametrize("ratio", [0.7, 0.9])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_every_call_is_computed_recorded_and_counted(
    family: str, ratio: float, load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an expert loses its slot after its layer was launched."""
    monkeypatch.setitem(tiny_models._BASE, "num_hidden_layers", DEPTH)
    plain = Sequence(tiny.model(family), 1)
    for _ in range(STEPS):
        plain.step()
    rng = random.Random(1)
    call, hit = CudaLayer.__call__, Controller.hit
    lost = 0

    def disturb(engine: Any) -> None:
        layer = rng.randrange(len(engine.layers))
        candidates = engine.controller.pool.evictable(layer)
        if candidates:
            engine.controller.residency.evict(ExpertRef(layer, rng.choice(candidates)))

    def disturbed(layer: CudaLayer, *args: Any, **kwargs: Any) -> Any:
        if rng.random() < 0.2:
            disturb(engine)
        return call(layer, *args, **kwargs)

    def counted(controller: Controller, *args: Any) -> Any:
        nonlocal lost
        layer, experts, *_ = args
        lost += not controller.pool.cached[layer].keys() >= set(experts)
        return hit(controller, *args)

    monkeypatch.setattr(CudaLayer, "__call__", disturbed)
    monkeypatch.setattr(Controller, "hit", counted)
    with late_device(monkeypatch, 1) as capture:
        model = load_captured(family, capture, cache_ratio=ratio)
        (engine,) = model.hybrimoe.engines
        for layer in cuda_layers_of(model):
            if layer._link is not None:
                layer._link.sure = rng.choice((0.0, 0.0, 0.3))
        calls: list[Any] = []
        model.hybrimoe.record(calls.append)
        ours = Sequence(model, 1)
        for _ in range(STEPS):
            ours.step()
        assert ours.tokens == plain.tokens
        assert lost or ratio > 0.7, "an expert has lost its slot after it was used"
        assert len(calls) == model.hybrimoe.stats().calls == STEPS * len(engine.layers)
        assert [call.layer for call in calls] == [*range(len(engine.layers))] * STEPS
        model.hybrimoe.check_integrity()


def test_a_layer_that_the_host_plans_parts_a_chain(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies before it is proved too."""
    monkeypatch.setitem(tiny_models._BASE, "num_hidden_layers", DEPTH)
    find = connect.link_of

    def link_of(experts: Any, *rest: Any) -> Any:
        return None if experts.layer_index == 2 else find(experts, *rest)

    monkeypatch.setattr(connect, "link_of", link_of)
    proved: list[str] = []
    prove = ProvenChain._prove

    def watched(chain: ProvenChain, steps: Any) -> None:
        proved.append(f"{chain._name}: {len(steps)}")
        prove(chain, steps)

    monkeypatch.setattr(ProvenChain, "_prove", watched)
    model = load_captured("mixtral", Replayed(), cache_ratio=0.7)
    ours, plain = Sequence(model, 1), Sequence(tiny.model("mixtral"), 1)
    for _ in range(6):
        ours.step()
        plain.step()
    assert ours.tokens == plain.tokens
    assert set(proved) == {
        "model.layers.0 to model.layers.1: 2",
        "model.layers.3 to model.layers.5: 3",
    }
    chains = [layer.chain for layer in cuda_layers_of(model)]
    assert chains[2] is None
    assert all(chain is None or chain.proven for chain in chains)
