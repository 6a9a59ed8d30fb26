"""Steps of several sequences as replayed graphs give the plain model's logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from batches import Batch, Both, batches_of, padded, sizes_of
from graphed import Loader, Sequence, cuda_layers_of, greedy
from late_device import late_device
from replayed import Replayed

from hybrimoe_plugin.decode.batch.steady_batches import BATCHES, STEADY
from hybrimoe_plugin.engine import CallRecord

PROVED = STEADY + 3
"""Steps from the prompt to the last one that is run eagerly."""


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_logits_are_the_plain_models(family: str, rows: int, load_captured: Loader) -> None:
    """Sequences of different lengths; 7 to 20 tokens: capacities of 16 and 32."""
    capture = Replayed()
    model, plain = load_captured(family, capture), tiny.model(family)
    both = Both(model, plain, rows)
    both.steps(PROVED)
    layers = cuda_layers_of(model)
    assert sizes_of(model) == [rows] * len(layers)
    before = capture.captured, capture.replayed
    both.steps(1)
    assert capture.captured == before[0]
    assert capture.replayed >= before[1] + len(layers)
    both.steps(9)
    assert capture.captured == 2 * before[0], "anew for the larger cache"
    assert sizes_of(model) == [rows] * len(layers)
    assert not capture.abandoned


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek_v2_lite"])
def test_generate_gives_the_plain_models_tokens(family: str, load_captured: Loader) -> None:
    """With and without padding; sequences that end early go on with padding tokens."""
    model, plain = load_captured(family, Replayed()), tiny.model(family)
    ids, mask = padded(4)
    for given in ({}, {"attention_mask": mask}):
        options: dict[str, Any] = {"eos_token_id": 2, **given}
        assert greedy(model, ids, 14, **options) == greedy(plain, ids, 14, **options)
    answer = plain.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    ends = [int(answer[0, 9]), int(answer[1, 15])]
    options = {"eos_token_id": ends, "pad_token_id": 0, "do_sample": False}
    found, wanted = (
        built.generate(ids, attention_mask=mask, max_new_tokens=20, **options)
        for built in (model, plain)
    )
    assert torch.equal(found, wanted)
    assert set(sizes_of(model)) == {4}
    options = {"num_beams": 4, "eos_token_id": 2}
    assert greedy(model, ids[:1], 12, **options) == greedy(plain, ids[:1], 12, **options)


def test_the_engine_sees_what_it_sees_without_graphs(load_captured: Loader) -> None:
    """Routing, scores and predictions of all rows; each call counted once."""
    seen: list[list[CallRecord]] = []
    steps = PROVED + 4
    for capture in (Replayed(), None):
        model = load_captured("qwen3_moe", capture)
        calls: list[CallRecord] = []
        model.hybrimoe.record(calls.append)
        batch = Batch(model, *padded(4))
        for _ in range(steps):
            batch.step()
        assert model.hybrimoe.stats().calls == 2 * steps
        seen.append(calls)
    for ours, theirs in zip(*seen, strict=True):
        assert (ours.topk_ids == theirs.topk_ids).all()
        assert ours.scores is not None and theirs.scores is not None
        torch.testing.assert_close(torch.from_numpy(ours.scores), torch.from_numpy(theirs.scores))
        assert len(ours.predicted) == len(theirs.predicted)
        assert all((a == b).all() for a, b in zip(ours.predicted, theirs.predicted, strict=True))


def test_a_sequence_ends_and_another_one_comes(load_captured: Loader) -> None:
    """4 -> 3 -> 4: three run eagerly, and the graphs of four are still there."""
    capture = Replayed()
    model, plain = load_captured("mixtral", capture, context=64), tiny.model("mixtral")
    both = Both(model, plain, 4, longest=17)
    both.steps(PROVED)
    captured = capture.captured
    both.keep([0, 1, 3])
    replayed = capture.replayed
    both.steps(2)
    assert capture.replayed == replayed
    both.keep([0, 1, 2, 1])
    both.steps(3)
    assert capture.replayed > replayed
    assert capture.captured == captured and set(sizes_of(model)) == {4}


def test_graphs_are_kept_for_one_number_of_sequences(load_captured: Loader) -> None:
    """That of the last steps that were steady."""
    capture = Replayed()
    model, plain = load_captured("mixtral", capture), tiny.model("mixtral")
    four, eight = Both(model, plain, 4, longest=3), Both(model, plain, 8, longest=3, seed=1)
    four.steps(PROVED)
    captured = capture.captured
    for _ in range(STEADY + 1):  # never steady
        eight.steps(1)
        four.steps(1)
    assert capture.captured == captured and set(sizes_of(model)) == {4}
    eight.steps(PROVED - 1)
    assert capture.captured == 2 * captured and set(sizes_of(model)) == {8}
    four.steps(PROVED - 1)
    assert set(sizes_of(model)) == {4}
    eight.steps(1)


def test_batches_and_single_sequences_take_turns(load_captured: Loader) -> None:
    """Each has its own place for a cache; two batches of one size take turns in theirs."""
    model, plain = load_captured("deepseek_v3", Replayed()), tiny.model("deepseek_v3")
    one, other = Both(model, plain, 2, longest=4), Both(model, plain, 2, longest=9, seed=1)
    ours, theirs = Sequence(model, 5), Sequence(plain, 5)
    rng = random.Random(0)
    for _ in range(24):
        rng.choice((one, other)).steps(rng.randrange(1, 3))
        for sequence in (ours, theirs):
            sequence.step()
    assert ours.tokens == theirs.tokens
    assert set(sizes_of(model)) == {2}
    assert all(layer.captured for layer in cuda_layers_of(model))


@pytest.mark.parametrize("seed", [1, 2])
def test_on_a_device_that_is_late(
    seed: int, load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a sequence whose layers are launched ahead."""
    plain = tiny.model("mixtral")
    batch, single = Batch(plain, *padded(4)), Sequence(plain, 5)
    wanted = [batch.step() for _ in range(20)]
    for _ in range(20):
        single.step()
    with late_device(monkeypatch, seed) as capture:
        model = load_captured("mixtral", capture)
        ours, alone = Batch(model, *padded(4)), Sequence(model, 5)
        for right in wanted:
            torch.testing.assert_close(ours.step(), right)
            alone.step()
        assert alone.tokens == single.tokens
        assert set(sizes_of(model)) == {4}
        assert all(layer.chain.proven for layer in cuda_layers_of(model))  # type: ignore[union-attr]


def test_other_calls_run_eagerly(load_captured: Loader) -> None:
    """Numbers without graphs, several tokens of one sequence, other kinds of cache."""
    capture = Replayed()
    model, plain = load_captured("mixtral", capture), tiny.model("mixtral")
    for rows in (3, 5):
        Both(model, plain, rows).steps(PROVED)
    ids, mask = padded(4)
    options = {"attention_mask": mask, "cache_implementation": "static"}
    assert greedy(model, ids, 12, **options) == greedy(plain, ids, 12, **options)
    assert batches_of(model) and not capture.captured
    both = Both(model, plain, 4)
    both.steps(PROVED)
    replayed = capture.replayed
    for batch in (both.ours, both.plain):
        batch.ids = torch.cat([batch.ids, batch.ids], dim=1)  # two tokens of each
        batch.mask = torch.cat([batch.mask, torch.ones_like(batch.ids[:, :1])], dim=1)
    both.steps(1)
    assert capture.replayed == replayed
    both.steps(2)
    assert capture.replayed > replayed
