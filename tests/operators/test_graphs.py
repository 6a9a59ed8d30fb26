"""Decode as replayed pieces: the plain model's tokens, through growth and other sequences;
refusals; the twin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from replayed import Replayed
from steps import step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import FixedCache, GrowingLayer, cache_in
from hybrimoe_plugin.decode import graphed_layer as graphs
from hybrimoe_plugin.decode.graphed_layer import PROOFS, UNDECIDED, GraphedLayer
from hybrimoe_plugin.engine import CallRecord

STEPS = 44
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(graphs, "ROOM", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    yield
    torch.set_num_threads(threads)


Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads injected models whose decoding goes through the given capture."""
    models = []

    def build(family: str, capture: Replayed | None, **settings: Any) -> Any:
        monkeypatch.setattr(graphs, "capture_for", lambda device: capture)
        choices = {
            "accelerator": "emulated",
            "linears": "plain",
            "cpu_backend": "torch",
            "cache_ratio": 0.5,
        }
        path = tiny.write(tmp_path, family)
        models.append(
            load_model(None, path, dtype="float32", progress=False, **{**choices, **settings})[0]
        )
        return models[-1]

    yield build
    for model in models:
        model.hybrimoe.close()


def greedy(model: Any, prompt: torch.Tensor, steps: int = STEPS, **options: Any) -> list[int]:
    answer = model.generate(
        prompt,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return [int(token) for token in answer[:, prompt.shape[1] :].flatten()]


def layers_of(model: Any) -> list[GraphedLayer]:
    return [module for module in model.modules() if isinstance(module, GraphedLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_plain_models(family: str, load: Load) -> None:
    capture = Replayed()
    model = load(family, capture)
    prompt = tiny.tokens(7)
    assert greedy(model, prompt) == greedy(tiny.model(family), prompt)
    layers = layers_of(model)
    # 7 to 50 tokens: rooms of 16, 32 and 64, each captured anew; a dense layer is one piece, the
    # last looks at nothing.
    pieces = sum(
        3 if layer._experts and layer is not layers[-1] else 2 if layer._experts else 1
        for layer in layers
    )
    assert capture.captured == 3 * pieces
    assert capture.replayed > (STEPS - 5) * len(layers)
    assert not capture.abandoned
    moe = sum(1 for layer in layers if layer._experts)
    assert model.hybrimoe.stats().calls == STEPS * moe, (
        "once for each layer call, in proving steps too"
    )


def test_the_engine_sees_what_it_sees_without_graphs(load: Load) -> None:
    """Routing, scores and predictions."""
    seen: list[list[CallRecord]] = []
    for capture in (Replayed(), None):
        model = load("qwen3_moe", capture)
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


def test_room_is_no_more_than_the_asked_context(load: Load) -> None:
    capture = Replayed()
    model = load("mixtral", capture, context=20)
    prompt = tiny.tokens(12)
    assert greedy(model, prompt, 20) == greedy(tiny.model("mixtral"), prompt, 20)
    assert layers_of(model)[0]._rows[0].shape[2] == 32, "past it, doubling goes on"  # type: ignore[index]
    assert capture.captured == 3 * 5, "16, 20 and 32 tokens"


def test_sequences_take_turns(load: Load) -> None:
    """Each layer has one place for a cache: whoever loses it keeps what it holds."""
    capture = Replayed()
    model, plain = load("mixtral", capture), tiny.model("mixtral")
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
    assert capture.captured == 5, "the same graphs serve both"


def test_prompts_into_a_cache_in_use_and_cropping(load: Load) -> None:
    model, plain = load("deepseek_v3", Replayed()), tiny.model("deepseek_v3")
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


def test_other_calls_run_eagerly(load: Load) -> None:
    capture = Replayed()
    model, plain = load("qwen2_moe", capture), tiny.model("qwen2_moe")
    prompt = tiny.tokens(6, batch=2)
    assert greedy(model, prompt, 6) == greedy(plain, prompt, 6)
    padded = torch.ones_like(prompt)
    padded[1, :3] = 0
    found, wanted = (greedy(built, prompt, 6, attention_mask=padded) for built in (model, plain))
    assert found == wanted
    assert greedy(model, prompt[:1], 6, num_beams=3) == greedy(plain, prompt[:1], 6, num_beams=3)
    assert capture.captured == 0
    assert greedy(model, prompt[:1], 6) == greedy(plain, prompt[:1], 6)
    assert capture.captured > 0


def test_who_watches_gets_what_was_there(load: Load) -> None:
    model, plain = load("mixtral", Replayed()), tiny.model("mixtral")
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


def test_switches_and_restoring(load: Load) -> None:
    capture = Replayed()
    for settings in ({"cuda_graphs": "off"}, {"dense": "plain"}):
        model = load("qwen3_moe", capture, **settings)
        assert greedy(model, tiny.tokens(5), 9) == greedy(
            tiny.model("qwen3_moe"), tiny.tokens(5), 9
        )
    assert capture.captured == 0
    model, plain = load("qwen3_moe", capture), tiny.model("qwen3_moe")
    graphed = model.model.layers[0]
    assert type(graphed) is GraphedLayer and isinstance(graphed, type(plain.model.layers[0]))
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in plain.named_parameters() if "experts" not in n
    ]
    model.hybrimoe.restore()
    assert type(model.model.layers[0]) is type(plain.model.layers[0])
    assert type(model.model.layers[0].mlp.experts) is type(plain.model.layers[0].mlp.experts)


def frozen_place(
    cache: FixedCache, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    """Writes where the capturing step's token belongs, by a number: the next step's goes
    there too.
    """
    place = int(cache.buffers[0].shape[2]) - 10
    cache.buffers[0].narrow(2, place, 1).copy_(key)
    cache.buffers[1].narrow(2, place, 1).copy_(value)
    return cache.buffers


def read_place(
    cache: FixedCache, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    cache.buffers[0].narrow(2, int(cache.place), 1).copy_(key)
    return cache.buffers


def no_replay(number: int, _done: Any, replay: Callable[[], None]) -> Callable[[], None]:
    return (lambda: None) if number == 3 else replay


def late_replay(number: int, done: Any, replay: Callable[[], None]) -> Callable[[], None]:
    """The last operation of the first piece is left out."""
    if number == 1:
        done.pop()
    return replay


@pytest.mark.parametrize(
    ("spoil", "update", "reason", "captured"),
    [
        (no_replay, None, "differs from its eager twin", 3),
        (late_replay, None, "differs from its eager twin", 3),
        (None, frozen_place, "differs from its eager twin", 5),
        (None, read_place, "not permitted when stream is capturing", 0),
    ],
)
def test_a_wrong_replay_is_found_and_not_used(
    spoil: Any,
    update: Any,
    reason: str,
    captured: int,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if update is not None:
        monkeypatch.setattr(FixedCache, "update", update)
    capture = Replayed(spoil)
    model = load("mixtral", capture)
    prompt = tiny.tokens(6)  # the place that `frozen_place` has for its first step
    with caplog.at_level(logging.WARNING):
        assert greedy(model, prompt, 20) == greedy(tiny.model("mixtral"), prompt, 20)
    notices = [
        record.message for record in caplog.records if "CUDA graphs are not used" in record.message
    ]
    assert len(notices) == 1 and reason in notices[0], "said once"
    assert capture.captured == captured
    assert capture.replayed <= 3 * PROOFS, "nothing is replayed after that"


@pytest.mark.parametrize("times", [3, 1000])
def test_a_near_tie_proves_nothing(
    times: int, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """Another choice of experts may be rounding for some steps, but not for ever."""
    left = [times]

    def choose_another(number: int, done: Any, replay: Callable[[], None]) -> Callable[[], None]:
        if number != 1:
            return replay
        landed = next(
            args[0]
            for func, args, *_ in done
            if "copy_" in str(func) and args[0].dtype == torch.int64
        )

        def spoiled() -> None:
            replay()
            left[0] -= 1
            if left[0] >= 0:
                landed.copy_((landed + 1) % 8)

        return spoiled

    capture = Replayed(choose_another)
    model = load("mixtral", capture)
    prompt = tiny.tokens(2)
    assert greedy(model, prompt, 15) == greedy(tiny.model("mixtral"), prompt, 15)
    if times < UNDECIDED:
        assert all(layer.captured for layer in layers_of(model)) and not caplog.records
        assert left[0] == times - 14, "once for each token after the first"
    else:
        assert "chooses other experts than its eager twin" in caplog.text
        assert left[0] == times - UNDECIDED - 1


def test_the_stand_in_freezes_what_a_graph_freezes() -> None:
    capture, x, out = Replayed(), torch.arange(4.0), torch.zeros(4)
    number = 2
    with capture.aside():
        capture.begin()
        out.copy_((x * number).view(2, 2).flatten())
        replay = capture.end()
        capture.begin()
        with pytest.raises(RuntimeError, match="not permitted"):
            float(x.sum())
        capture.abandon()
    number = 5
    x.add_(1)
    replay()
    assert out.tolist() == [2, 4, 6, 8]


def test_an_interrupted_change_of_seats_leaves_the_others_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence lies in a layer's buffers; the step of another one is cut off while it takes its
    place.
    """
    model, steps = load("mixtral", Replayed()), PROOFS + 5
    wanted = [greedy(model, tiny.tokens(7, seed), steps) for seed in range(3)]
    for name, after in (("leave", False), ("_grow", True), ("_show", False), ("move", True)):
        first, second, third = (Sequence(model, seed) for seed in range(3))
        for _ in range(PROOFS + 2):
            first.step()
        second.step()
        real = getattr(GrowingLayer, name)

        def stopped(*args: Any) -> None:
            if after:  # noqa: B023
                real(*args)  # noqa: B023
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(GrowingLayer, name, stopped)
            second.step()
        for sequence in (third, first):
            while len(sequence.tokens) < steps:
                sequence.step()
        assert [first.tokens, third.tokens] == [wanted[0], wanted[2]], name


class Sequence:
    """A greedy answer made step by step, with a cache of its own."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model = model
        self._ids = tiny.tokens(7, seed)
        self._cache: Any = None
        self.tokens: list[int] = []

    def step(self) -> None:
        with torch.no_grad():
            output = (
                self._model(self._ids, use_cache=True)
                if self._cache is None
                else step(self._model, self._ids, self._cache)
            )
        self._cache = cache_in(output)
        self._ids = output.logits[:, -1:].argmax(dim=-1)
        self.tokens.append(int(self._ids))
