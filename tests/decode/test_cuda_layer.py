"""Decode as replayed graphs gives the plain model's tokens, through growth and other sequences."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from graphed import STEPS, Loader, cuda_layers_of, greedy
from replayed import Replayed
from steps import step

from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.engine import CallRecord

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_plain_models(family: str, load_captured: Loader) -> None:
    capture = Replayed()
    model = load_captured(family, capture)
    prompt = tiny.tokens(7)
    assert greedy(model, prompt) == greedy(tiny.model(family), prompt)
    layers = cuda_layers_of(model)
    # 7 to 50 tokens: capacities of 16, 32 and 64, each captured anew. A dense layer is one graph;
    # the last layer has no look-ahead.
    pieces = sum(
        4 if layer.experts and layer is not layers[-1] else 3 if layer.experts else 1
        for layer in layers
    )
    assert capture.captured == 3 * pieces
    assert capture.replayed > (STEPS - 5) * len(layers)
    assert not capture.abandoned
    moe = sum(1 for layer in layers if layer.experts)
    assert model.hybrimoe.stats().calls == STEPS * moe, (
        "once for each layer call, in proving steps too"
    )


def test_the_engine_sees_what_it_sees_without_graphs(load_captured: Loader) -> None:
    """Routing, scores and predictions."""
    seen: list[list[CallRecord]] = []
    for capture in (Replayed(), None):
        model = load_captured("qwen3_moe", capture)
        calls: list[CallRecord] = []
        model.hybrimoe.record(calls.append)
        greedy(model, tiny.tokens(6))
        seen.append(calls)
    assert len(seen[0]) == len(seen[1]) == 2 * STEPS
    for ours, theirs in zip(*seen, strict=True):
        assert (ours.topk_ids == theirs.topk_ids).all()
        assert ours.scores is not None and theirs.scores is not None
        torch.testing.assert_close(torch.from_numpy(ours.scores), torch.from_numpy(theirs.scores))
        assert len(ours.predicted) == len(theirs.predicted)
        assert all((a == b).all() for a, b in zip(ours.predicted, theirs.predicted, strict=True))


def test_capacity_is_no_more_than_the_asked_context(load_captured: Loader) -> None:
    capture = Replayed()
    model = load_captured("mixtral", capture, context=20)
    prompt = tiny.tokens(12)
    assert greedy(model, prompt, 20) == greedy(tiny.model("mixtral"), prompt, 20)
    assert cuda_layers_of(model)[0].buffers.kv[0].shape[2] == 32, "past it, doubling goes on"  # type: ignore[index]
    assert capture.captured == 3 * 7, "16, 20 and 32 tokens"


def test_sequences_take_turns(load_captured: Loader) -> None:
    """Each layer has one place for a cache: whoever loses it keeps what it holds."""
    capture = Replayed()
    model, plain = load_captured("mixtral", capture), tiny.model("mixtral")
    prompts = tiny.tokens(5), tiny.tokens(9, seed=1)
    steps = tiny.tokens(12, seed=2)[0]
    with torch.no_grad():
        outs = [
            (model(prompt, use_cache=True), plain(prompt, use_cache=True)) for prompt in prompts
        ]
        for turn, token in enumerate(steps):
            # In pairs, so that each also goes on without losing its place.
            which = turn // 2 % 2
            ours, theirs = outs[which]
            outs[which] = (
                step(model, token[None, None], cache_in(ours)),
                step(plain, token[None, None], cache_in(theirs)),
            )
            torch.testing.assert_close(outs[which][0].logits, outs[which][1].logits)
    assert capture.captured == 7, "the same graphs serve both"


def test_prompts_into_a_cache_in_use_and_cropping(load_captured: Loader) -> None:
    model, plain = load_captured("deepseek_v3", Replayed()), tiny.model("deepseek_v3")
    caches: list[Any] = [None, None]

    def both(ids: torch.Tensor) -> None:
        logits = []
        for index, built in enumerate((model, plain)):
            out = step(built, ids, caches[index])
            caches[index] = cache_in(out)
            logits.append(out.logits)
        torch.testing.assert_close(*logits)

    for mode in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        caches = [None, None]
        with mode:
            both(tiny.tokens(6))
            for token in tiny.tokens(5, seed=1)[0]:
                both(token[None, None])
            both(tiny.tokens(20, seed=2))  # more than there is room for
            for token in tiny.tokens(3, seed=3)[0]:
                both(token[None, None])
            for cache in caches:
                cache.crop(-4)
            for token in tiny.tokens(3, seed=4)[0]:
                both(token[None, None])


def test_other_calls_run_eagerly(load_captured: Loader) -> None:
    capture = Replayed()
    model, plain = load_captured("qwen2_moe", capture), tiny.model("qwen2_moe")
    prompt = tiny.tokens(6, batch=3)
    assert greedy(model, prompt, 6) == greedy(plain, prompt, 6)
    padded = torch.ones_like(prompt)
    padded[1, :3] = 0
    found, wanted = (greedy(built, prompt, 6, attention_mask=padded) for built in (model, plain))
    assert found == wanted
    assert greedy(model, prompt[:1], 6, num_beams=3) == greedy(plain, prompt[:1], 6, num_beams=3)
    assert capture.captured == 0
    assert greedy(model, prompt[:1], 6) == greedy(plain, prompt[:1], 6)
    assert capture.captured > 0


def test_who_watches_gets_what_was_there(load_captured: Loader) -> None:
    model, plain = load_captured("mixtral", Replayed()), tiny.model("mixtral")
    options = {
        "output_hidden_states": True,
        "return_dict_in_generate": True,
        "do_sample": False,
        "max_new_tokens": 9,
    }
    prompt = tiny.tokens(5)
    found, wanted = (
        built.generate(prompt, pad_token_id=0, eos_token_id=None, **options)
        for built in (model, plain)
    )
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert len(ours) == len(theirs) == 3
        torch.testing.assert_close(ours, theirs)
    # A hook inside a layer is called, graphs or not.
    called: list[int] = []
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda *_: called.append(1))
    greedy(model, prompt, 9)
    handle.remove()
    assert len(called) == 9


def test_switches_and_restoring(load_captured: Loader) -> None:
    capture = Replayed()
    for settings in ({"graphs": "off"}, {"dense": "plain"}):
        model = load_captured("qwen3_moe", capture, **settings)
        assert greedy(model, tiny.tokens(5), 9) == greedy(
            tiny.model("qwen3_moe"), tiny.tokens(5), 9
        )
    assert capture.captured == 0
    model, plain = load_captured("qwen3_moe", capture), tiny.model("qwen3_moe")
    graphed = model.model.layers[0]
    assert type(graphed) is GraphedLayer and isinstance(graphed, type(plain.model.layers[0]))
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in plain.named_parameters() if "experts" not in n
    ]
    model.hybrimoe.restore()
    assert type(model.model.layers[0]) is type(plain.model.layers[0])
    assert type(model.model.layers[0].mlp.experts) is type(plain.model.layers[0].mlp.experts)
