"""What people do with any transformers model: an injected one gives what the plain one gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from steps import prefill, step
from torch import nn
from transformers.generation.configuration_utils import CompileConfig
from uses import (
    GREEDY,
    IDS,
    PAIR,
    SETTINGS,
    Models,
    Use,
    called,
    every_step,
    generated,
    in_training,
    injected_and_plain,
)

from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    yield from injected_and_plain(tmp_path_factory)


def _left_padded(model: Any) -> Any:
    ids = PAIR.clone()
    mask = torch.ones_like(PAIR)
    ids[0, :4] = 0
    mask[0, :4] = 0
    return model.generate(ids, attention_mask=mask, **GREEDY)


def _right_padded(model: Any) -> Any:
    mask = torch.ones_like(PAIR)
    mask[0, -4:] = 0
    with torch.no_grad():
        logits = model(PAIR, attention_mask=mask).logits
    padded, whole = logits
    return [padded[:5], whole]


def _by_config(model: Any) -> Any:
    model.config.output_router_logits = model.config.output_hidden_states = True
    try:
        return [called(IDS, labels=IDS)(model), every_step()(model)]
    finally:
        model.config.output_router_logits = model.config.output_hidden_states = False


def _embedded(model: Any) -> Any:
    embeds = model.get_input_embeddings()(IDS).detach()
    return [*called(inputs_embeds=embeds)(model), model.generate(inputs_embeds=embeds, **GREEDY)]


def _with_gradients_enabled(model: Any) -> Any:
    return [
        model(IDS).logits.detach(),
        model(IDS[:, :1]).logits.detach(),
        model(IDS, labels=IDS).loss.detach(),
    ]


def _continued(model: Any) -> Any:
    first = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
    more = tiny.tokens(3, seed=5)
    longer = torch.cat([first.sequences, more], dim=1)
    cache = {cache_name(model): cache_in(first)}
    return model.generate(longer, **cache, **GREEDY)


@torch.no_grad()
def _forked(model: Any) -> Any:
    """Two sequences go on from one prompt, each in a copy of its cache."""
    cache = prefill(model, IDS)
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    found = []
    for at in range(3):
        ids = IDS[:, at : at + 1]
        found.append(step(model, ids, cache).logits)
        found.append(step(model, ids + 9, fork).logits)
    return found


@torch.no_grad()
def _gone_back(model: Any) -> Any:
    """What was held of a cache before it was cropped and gone on with is still that."""
    cache = prefill(model, IDS)
    held = [(layer.keys, layer.values) for layer in cache.layers]
    cache.crop(-4)
    found = []
    for at in range(3):
        ids = IDS[:, at : at + 1] + 9
        found.append(step(model, ids, cache).logits)
    for layer, (keys, values) in zip(cache.layers, held, strict=True):
        layer.keys = keys
        layer.values = values
    back = step(model, IDS[:, :1], cache)
    return [*found, back.logits]


def _untouched(model: Any) -> Any:
    """What changes nothing is no matter."""
    model.tie_weights()
    model.to("cpu").float().eval()
    model.resize_token_embeddings(96)
    model.set_input_embeddings(model.get_input_embeddings())
    model.set_attn_implementation("sdpa")
    return called(IDS)(model)


USES: dict[str, Use] = {
    "labels": called(IDS, labels=IDS),
    "gradients enabled": _with_gradients_enabled,
    "output_router_logits": called(IDS, labels=IDS, output_router_logits=True),
    "output_hidden_states": called(IDS, output_hidden_states=True, logits_to_keep=1),
    "output_hidden_states in decode": every_step(output_hidden_states=True),
    "outputs asked for by config": _by_config,
    "left padding": _left_padded,
    "right padding": _right_padded,
    "position_ids": called(IDS, position_ids=torch.arange(5, 14)[None]),
    "inputs_embeds": _embedded,
    "logits_to_keep as indices": called(IDS, logits_to_keep=torch.tensor([1, 3])),
    "beams": generated(num_beams=3, num_return_sequences=2),
    "prompt lookup": generated(prompt_lookup_num_tokens=3, max_new_tokens=8),
    "prefill in chunks": generated(prefill_chunk_size=4),
    "no cache": generated(use_cache=False),
    "a cache gone on with": _continued,
    "a cache forked": _forked,
    "a cache gone back to": _gone_back,
    "static cache": generated(cache_implementation="static"),
    "train()": in_training,
    "nothing changed": _untouched,
}


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_uses_give_what_the_plain_model_gives(family: str, models: Models) -> None:
    model, right = models[family]
    for name, use in USES.items():
        found, wanted = use(model), use(right)
        torch.testing.assert_close(found, wanted, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_assistant_speeds_it_up_and_changes_nothing(family: str, models: Models) -> None:
    model, right = models[family]
    options = {**GREEDY, "max_new_tokens": 8}
    assisted = model.generate(IDS, assistant_model=tiny.model(family), **options)
    assert torch.equal(assisted, right.generate(IDS, **options))


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")(IDS).logits


def _compiled_base(model: Any) -> Any:
    return torch.compile(model.model, backend="eager")(IDS).last_hidden_state


def _compiled_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    try:
        return model(IDS).logits
    finally:
        for layer in model.model.layers:
            layer._compiled_call_impl = None


def _compiled_by_generate(model: Any) -> Any:
    compiled = CompileConfig(backend="eager", fullgraph=False)
    compiled._compile_all_devices = True  # transformers does it on a GPU only
    return model.generate(IDS, cache_implementation="static", compile_config=compiled, **GREEDY)


def _plain(model: Any) -> Any:
    return model(IDS).logits


def _plain_base(model: Any) -> Any:
    return model.model(IDS).last_hidden_state


@pytest.mark.parametrize(
    ("use", "uncompiled"),
    [
        (_compiled, _plain),
        (_compiled_base, _plain_base),
        (_compiled_layers, _plain),
        (_compiled_by_generate, generated()),
    ],
)
@torch.no_grad()
def test_torch_compile_leaves_the_operators_alone(
    use: Use, uncompiled: Use, models: Models
) -> None:
    model, right = models["mixtral"]
    torch._dynamo.reset()
    torch.testing.assert_close(use(model), uncompiled(right))
    torch.testing.assert_close(_plain(model), _plain(right))


def test_a_linear_that_is_replaced_later_counts(models: Models) -> None:
    """What PEFT does to attention: the module around the old one must be called, and not the old
    one.
    """
    model, _ = models["qwen2_moe"]
    attention = model.model.layers[0].self_attn
    before = attention.v_proj

    class Doubled(nn.Module):
        bias = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = 2 * before(x)
            return doubled

    (once,) = called(IDS)(model)
    attention.v_proj = Doubled()
    try:
        (twice,) = called(IDS)(model)
    finally:
        attention.v_proj = before
    assert not torch.allclose(once, twice)
    torch.testing.assert_close(called(IDS)(model), [once])
