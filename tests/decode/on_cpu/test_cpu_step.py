"""One token in two graphs a layer: the plain model's logits in every family, and when the layer
itself is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import prefill, step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.last_tokens import LastLayer
from hybrimoe_plugin.decode.layer_call import EagerLayer
from hybrimoe_plugin.decode.on_cpu.cpu_layer import CpuLayer
from hybrimoe_plugin.decode.on_cpu.cpu_step import CpuStep
from hybrimoe_plugin.hosts.transformers import load_plain_model

needs.kt_kernel()

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
STEPS = 6

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    models = []

    def build(
        family: str, types: Callable[[str], str] = lambda name: "F32", **settings: Any
    ) -> Any:
        path = tiny.write(tmp_path, family, types=types)
        models.append(load_model(None, path, progress=False, accelerator="none", **settings)[0])
        return models[-1]

    yield build
    for model in models:
        model.hybrimoe.close()


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[CpuStep]:
    """Every step that is taken."""
    taken: list[CpuStep] = []
    call = CpuStep.__call__

    def note(self: CpuStep, *args: Any) -> torch.Tensor:
        taken.append(self)
        return call(self, *args)

    monkeypatch.setattr(CpuStep, "__call__", note)
    return taken


def layers(model: Any) -> list[GraphedLayer]:
    return [module for module in model.modules() if isinstance(module, GraphedLayer)]


def own_call(layer: GraphedLayer) -> Any:
    """What serves a layer's calls, without what cuts the last layer of a prompt."""
    call = layer.layer_call
    return call.call if isinstance(call, LastLayer) else call


def step_of(layer: GraphedLayer) -> CpuStep:
    call = own_call(layer)
    assert isinstance(call, CpuLayer)
    return call.step


@torch.no_grad()
def decode(model: Any, prompt: torch.Tensor, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [B, S, V] of given tokens [B, S] after a prompt, one at a time."""
    cache = prefill(model, prompt, **options)
    found = []
    for at in range(tokens.shape[1]):
        out = step(model, tokens[:, at : at + 1], cache)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_plain_models(
    family: str, load: Load, stepped: list[CpuStep], tmp_path: Path
) -> None:
    model = load(family)
    prompt, tokens = tiny.tokens(5), tiny.tokens(STEPS, seed=1)
    found = decode(model, prompt, tokens)
    assert len(stepped) == STEPS * len(layers(model)), "every layer, dense ones too"
    plain = load_plain_model(None, tmp_path / "model.gguf", dtype="float32", progress=False)[0]
    torch.testing.assert_close(found, decode(plain, prompt, tokens), rtol=1e-4, atol=1e-4)
    apart = load(family, graphs="off")
    del stepped[:]
    torch.testing.assert_close(found, decode(apart, prompt, tokens), rtol=1e-5, atol=1e-5)
    assert not stepped
    assert all(isinstance(layer.layer_call, EagerLayer) for layer in layers(apart))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2_lite"])
def test_sequences_take_turns_at_different_places(family: str, load: Load) -> None:
    """The rotation is shared by layers, the graphs' buffers by sequences: neither may leak."""
    model = load(family)
    prompts = tiny.tokens(4), tiny.tokens(9, seed=2)
    tokens = tiny.tokens(STEPS, seed=1)
    alone = [decode(model, prompt, tokens) for prompt in prompts]
    with torch.inference_mode():
        caches = [prefill(model, prompt) for prompt in prompts]
        found: list[list[torch.Tensor]] = [[], []]
        for at in range(STEPS):
            for which, cache in enumerate(caches):
                found[which].append(step(model, tokens[:, at : at + 1], cache).logits)
    for logits, wanted in zip(found, alone, strict=True):
        assert torch.equal(torch.cat(logits, dim=1), wanted)


def test_what_was_given_stays_as_it_was(load: Load) -> None:
    """Outputs must not lie in buffers that the next token fills, nor what a router's hook saw."""
    model = load("deepseek_v2_lite")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_module: Any, given: tuple[torch.Tensor, ...], answer: Any) -> None:
        seen.extend(
            (part, part.clone())
            for part in (*given, *(answer if isinstance(answer, tuple) else (answer,)))
        )

    for module in (
        *layers(model),
        *(layer.mlp.gate for layer in layers(model) if hasattr(layer.mlp, "gate")),
    ):
        module.register_forward_hook(keep)
    decode(model, tiny.tokens(4), tiny.tokens(STEPS, seed=1))
    assert len(seen) > 4 * STEPS
    assert all(torch.equal(part, copy) for part, copy in seen)


def test_the_threads_may_change(load: Load) -> None:
    model = load("mixtral")
    prompt, tokens = tiny.tokens(4), tiny.tokens(STEPS, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(decode(model, prompt, tokens))
    finally:
        torch.set_num_threads(before)
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=1e-5, atol=1e-5)


def test_no_cache_at_all(load: Load, stepped: list[CpuStep]) -> None:
    model = load("qwen3_moe")
    with torch.no_grad():
        found = model(tiny.tokens(1), use_cache=False).logits
        assert len(stepped) == len(layers(model))
        torch.testing.assert_close(
            found, model(tiny.tokens(2), use_cache=False).logits[:, :1], rtol=1e-4, atol=1e-4
        )


def test_other_calls_are_the_layer_s_own(load: Load, stepped: list[CpuStep]) -> None:
    model = load("mixtral")
    prompt, tokens = tiny.tokens(4), tiny.tokens(2, seed=1)
    decode(model, prompt.expand(2, -1), tokens.expand(2, -1))  # a batch
    model(tokens[:, :1]).logits.sum()  # gradients
    padded = torch.tensor([[0, 1, 1, 1]])
    with torch.no_grad():
        cache = prefill(model, prompt, attention_mask=padded)
        mask = torch.cat((padded, torch.ones(1, 1, dtype=torch.int64)), dim=1)
        masked = step(model, tokens[:, :1], cache, attention_mask=mask).logits
    assert not stepped
    torch.testing.assert_close(
        masked, decode(model, prompt[:, 1:], tokens[:, :1]), rtol=1e-4, atol=1e-4
    )
    calls: list[torch.Tensor] = []
    watched = layers(model)[1]
    hook = watched.input_layernorm.register_forward_hook(
        lambda module, given, answer: calls.append(answer)
    )
    del stepped[:]
    decode(model, prompt, tokens)
    assert len(calls) == 3
    assert step_of(watched) not in stepped and step_of(layers(model)[0]) in stepped
    hook.remove()
    decode(model, prompt, tokens)
    assert len(calls) == 3 and step_of(watched) in stepped


@pytest.mark.parametrize(
    "settings", [{"dense": "dequantised"}, {"dense": "plain"}, {"dtype": "bfloat16"}]
)
def test_only_stored_matrices_and_float32(
    settings: dict[str, Any], load: Load, stepped: list[CpuStep]
) -> None:
    decode(load("mixtral", **settings), tiny.tokens(4), tiny.tokens(1))
    assert not stepped
