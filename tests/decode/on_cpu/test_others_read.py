"""Layers that are computed together: whoever else is given an output finds it computed, and may
keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import needs
import pytest
import tiny
import torch
from steps import prefill, step
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.decode.on_cpu.lazy_chain import LazyChain

needs.kt_kernel()
needs.operations()

STEPS = 4
PROMPT, TOKENS = tiny.tokens(5), tiny.tokens(STEPS, seed=1)

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 3},
}
"""And changes of their configs; the layers of the second are dense but for the last."""
GGML = {"cpu_backend": "ggml"}

Attempt = Callable[[Any], list[torch.Tensor]]
"""What somebody sees of a model's steps."""


class Pair(NamedTuple):
    """A model whose layers are computed together, and its twin of ggml's graphs."""

    model: Any
    twin: Any

    def check(self, attempt: Attempt) -> None:
        steps(self.model)  # from here on layers wait for the last one
        found = torch.stack(attempt(self.model))
        torch.testing.assert_close(found, torch.stack(attempt(self.twin)), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("model")
    changes = {"num_hidden_layers": 4, **FAMILIES[request.param]}
    path = tiny.write(folder, request.param, types=lambda name: "F32", changes=changes)
    options: dict[str, Any] = {"progress": False, "accelerator": "none"}
    made = Pair(*(load_model(None, path, **options, **more)[0] for more in ({}, GGML)))
    yield made
    for model in made:
        model.hybrimoe.close()


@torch.no_grad()
def steps(model: Any) -> list[torch.Tensor]:
    """Logits of each step behind a prompt."""
    cache = prefill(model, PROMPT)
    return [step(model, TOKENS[:, at : at + 1], cache).logits for at in range(STEPS)]


def test_layers_are_computed_together(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the other tests would show nothing."""
    steps(pair.model)
    waiting: list[int] = []
    settle = LazyChain.settle

    def note(chain: LazyChain) -> None:
        waiting.append(len(chain._pending))
        settle(chain)

    monkeypatch.setattr(LazyChain, "settle", note)
    steps(pair.model)
    assert [count for count in waiting if count] == [4] * STEPS


def test_a_step_may_end_early(pair: Pair) -> None:
    """As where transformers drafts with the first layers (`assistant_early_exit`)."""

    def attempt(model: Any) -> list[torch.Tensor]:
        model.config.num_hidden_layers = 2
        try:
            return steps(model)
        finally:
            model.config.num_hidden_layers = 4

    pair.check(attempt)


@pytest.mark.parametrize("order", [(0, 2, 3), (0, 2, 1, 3), (0, 1)])
def test_layers_may_be_left_out_or_change_places(pair: Pair, order: tuple[int, ...]) -> None:
    def attempt(model: Any) -> list[torch.Tensor]:
        base, layers = model.model, model.model.layers
        with torch.no_grad():
            cache = prefill(model, PROMPT)
            base.layers = nn.ModuleList([layers[at] for at in order])
            try:
                return [step(model, TOKENS[:, at : at + 1], cache).logits for at in range(STEPS)]
            finally:
                base.layers = layers

    pair.check(attempt)


def test_a_layer_in_another_module(pair: Pair) -> None:
    class Steered(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.seen: list[torch.Tensor] = []

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = self.layer(*args, **kwargs)
            self.seen.append(output[:, -1].norm())
            return output

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.layer, name)

    def attempt(model: Any) -> list[torch.Tensor]:
        layers = model.model.layers
        layer = layers[1]
        layers[1] = steered = Steered(layer)
        try:
            steps(model)
        finally:
            layers[1] = layer
        return steered.seen

    pair.check(attempt)


def test_layers_called_one_by_one(pair: Pair) -> None:
    """Each call's output is the caller's: later calls do not write it."""

    def attempt(model: Any) -> list[torch.Tensor]:
        base = model.model
        found = []
        with torch.no_grad():
            cache = prefill(model, PROMPT)
            for at in range(STEPS):
                hidden = base.embed_tokens(TOKENS[:, at : at + 1])
                embeddings = base.rotary_emb(hidden, torch.tensor([[5 + at]]))
                for layer in base.layers:
                    hidden = layer(
                        hidden, position_embeddings=embeddings, **{cache_name(layer): cache}
                    )
                    found.append(hidden)
        return found

    pair.check(attempt)


def test_what_a_hook_inside_a_layer_keeps(pair: Pair) -> None:
    """The layer is called as its modules then; the one before it is not watched."""

    def attempt(model: Any) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        norm = model.model.layers[2].input_layernorm
        hook = norm.register_forward_pre_hook(lambda module, given: kept.append(given[0][:, -1]))
        steps(model)
        hook.remove()
        return kept

    pair.check(attempt)


def test_hooks_on_all_modules(pair: Pair) -> None:
    def attempt(model: Any) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        layer = model.model.layers[1]

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            if module is layer:
                kept.append(output[:, -1].clone())

        hook = register_module_forward_hook(keep)
        try:
            steps(model)
        finally:
            hook.remove()
        return kept

    pair.check(attempt)


def test_another_forward_of_a_layer(pair: Pair) -> None:
    """As tools that wrap `forward` do, in place of hooks."""

    def attempt(model: Any) -> list[torch.Tensor]:
        layer = model.model.layers[1]
        forward = layer.forward
        seen: list[torch.Tensor] = []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen.append(output[:, -1].norm())
            return output

        layer.forward = wrapped
        try:
            steps(model)
        finally:
            layer.forward = forward
        return seen

    pair.check(attempt)
