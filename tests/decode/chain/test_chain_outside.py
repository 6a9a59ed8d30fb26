"""Outputs that a chain has given out are right for whoever else reads them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from chained import proven
from graphed import Loader, Sequence, cuda_layers_of, greedy, layers_of
from late_device import late_device
from replayed import Replayed

from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.decode.chain.chain import LayerCall
from hybrimoe_plugin.errors import BackendError


def eager_to_launch(model: Any) -> None:
    """Let every layer be launched before it is known whether the one before it has a miss."""
    for layer in cuda_layers_of(model):
        if layer._link is not None:
            layer._link.sure = 0.0


@pytest.fixture
def voids(monkeypatch: pytest.MonkeyPatch) -> list[LayerCall]:
    """Calls that missed after all of them was launched."""
    found: list[LayerCall] = []
    compute = LayerCall.compute_missing

    def compute_missing(call: LayerCall) -> None:
        if call.whole:
            found.append(call)
        compute(call)

    monkeypatch.setattr(LayerCall, "compute_missing", compute_missing)
    return found


def test_a_pass_that_leaves_its_last_layers_out(
    load_captured: Loader, voids: list[LayerCall]
) -> None:
    """As `assistant_early_exit` does: the norm reads what no layer behind has settled."""
    model, plain = load_captured("mixtral", Replayed(), cache_ratio=0.5), tiny.model("mixtral")
    eager_to_launch(model)
    ours, theirs = Sequence(model, 1), Sequence(plain, 1)
    for _ in range(8):
        ours.step()
        theirs.step()
    assert proven(model)
    model.config.num_hidden_layers = plain.config.num_hidden_layers = 1
    for _ in range(24):
        ours.step()
        theirs.step()
    assert ours.tokens == theirs.tokens
    assert voids


def test_a_layer_that_is_called_by_itself(load_captured: Loader, voids: list[LayerCall]) -> None:
    model, plain = load_captured("mixtral", Replayed(), cache_ratio=0.5), tiny.model("mixtral")
    eager_to_launch(model)
    ours, theirs = Sequence(model, 1), Sequence(plain, 1)
    for _ in range(8):
        ours.step()
        theirs.step()
    assert proven(model)
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        hidden = torch.randn(1, 1, model.config.hidden_size, generator=generator)
        found = []
        for sequence in (ours, theirs):
            base, position = sequence._model.model, torch.tensor([[14 + index]])
            with torch.no_grad():
                embeddings = base.rotary_emb(hidden, position)
                output = base.layers[0](
                    hidden,
                    position_embeddings=embeddings,
                    attention_mask=None,
                    past_key_values=sequence._cache,
                    use_cache=True,
                )
            found.append(output.clone())
        torch.testing.assert_close(*found)
    assert voids


def test_hooks_on_the_experts_see_every_call(load_captured: Loader) -> None:
    def double(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 2

    model = load_captured("mixtral", Replayed(), cache_ratio=1.0)
    plain = tiny.model("mixtral")
    ours, theirs = Sequence(model, 1), Sequence(plain, 1)
    for step in range(30):
        if step == 8:
            assert proven(model)
            for each in (model, plain):
                each.model.layers[0].mlp.experts.register_forward_hook(double)
        ours.step()
        theirs.step()
    assert ours.tokens == theirs.tokens


def test_a_hook_that_changes_a_layers_input_in_place(load_captured: Loader) -> None:
    def shift(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].mul_(-3.0)

    model, plain = load_captured("mixtral", Replayed(), cache_ratio=1.0), tiny.model("mixtral")
    ours, theirs = Sequence(model, 1), Sequence(plain, 1)
    for step in range(30):
        if step == 8:
            assert proven(model)
            for each in (model, plain):
                each.model.layers[1].register_forward_pre_hook(shift)
        ours.step()
        theirs.step()
    assert ours.tokens == theirs.tokens


def test_a_model_that_works_between_its_layers(load_captured: Loader) -> None:
    """What reads a layer's output before the next one does is no hook, and asks for nothing."""

    def run(model: Any) -> list[int]:
        first = model.model.layers[0]
        first.forward = scaled(first.forward)
        return greedy(model, tiny.tokens(7))

    model = load_captured("mixtral", Replayed(), cache_ratio=0.5)
    eager_to_launch(model)
    assert run(model) == run(tiny.model("mixtral"))


def test_calls_that_are_recorded_are_all_there(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with late_device(monkeypatch, 1) as capture:
        model = load_captured("deepseek_v3", capture, cache_ratio=0.7)
        eager_to_launch(model)
        calls: list[Any] = []
        model.hybrimoe.record(calls.append)
        greedy(model, tiny.tokens(7))
        moe = sum(1 for layer in layers_of(model) if layer.layer_call.experts)
        assert len(calls) == 44 * moe
        assert model.hybrimoe.stats().calls == 44 * moe


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_work_that_comes_between_the_layers_later(ratio: float, load_captured: Loader) -> None:
    """Where an output was read before it was right, an error says so."""
    model, plain = load_captured("mixtral", Replayed(), cache_ratio=ratio), tiny.model("mixtral")
    eager_to_launch(model)
    ours, theirs = Sequence(model, 1), Sequence(plain, 1)

    def go_on() -> None:
        for _ in range(16):
            ours.step()
            theirs.step()

    go_on()
    assert proven(model)
    for each in (model, plain):
        each.model.layers[0].forward = scaled(each.model.layers[0].forward)
    if ratio < 1:
        (engine,) = model.hybrimoe.engines
        for expert in engine.controller.pool.evictable(0):
            engine.controller.residency.evict(ExpertRef(0, expert))
        with pytest.raises(BackendError, match="read what was not computed yet"):
            go_on()
    else:
        go_on()
        assert ours.tokens == theirs.tokens
    assert not proven(model)


def scaled(call: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return call(*args, **kwargs) * -3.0

    return forward


def test_a_hook_on_all_modules_sees_what_is_right(
    load_captured: Loader, voids: list[LayerCall]
) -> None:
    model, plain = load_captured("mixtral", Replayed(), cache_ratio=0.5), tiny.model("mixtral")
    eager_to_launch(model)
    sequences = Sequence(model, 1), Sequence(plain, 1)
    for _ in range(8):
        for sequence in sequences:
            sequence.step()
    assert proven(model)
    layers = {*layers_of(model), *plain.model.layers}
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if module in layers:
            seen.append(output.clone())

    handle = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        for _ in range(16):
            for sequence in sequences:
                sequence.step()
    finally:
        handle.remove()
    found = [seen[at : at + 2] for at in range(0, len(seen), 4)]
    wanted = [seen[at + 2 : at + 4] for at in range(0, len(seen), 4)]
    assert len(found) == 16
    torch.testing.assert_close(found, wanted)
    assert sequences[0].tokens == sequences[1].tokens
    assert voids
