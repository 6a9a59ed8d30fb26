"""Graphs of several sequences: refused where they are wrong, right again after an interrupt."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import tiny
import torch
from batches import Both, batches_of, padded, sizes_of
from graphed import Loader, cuda_layers_of
from interrupts import ended, operations
from replayed import Replayed

from hybrimoe_plugin.compute.attention.decode_attention import GQAShape, MaskedAttention
from hybrimoe_plugin.compute.attention.kept_entries import cut_entries
from hybrimoe_plugin.decode import layer_buffers
from hybrimoe_plugin.decode.batch.batch_state import BatchState
from hybrimoe_plugin.decode.batch.steady_batches import STEADY

PROVED = STEADY + 3
CPU = torch.device("cpu")


def unmasked(kernel: MaskedAttention, held: int, given: torch.Tensor | None = None) -> None:
    """A mask that forgets the padding."""
    kernel._mask.fill_(float("-inf"))
    kernel._mask[..., : held + 1].zero_()


def test_a_wrong_mask_is_found(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MaskedAttention, "plan", unmasked)
    capture = Replayed()
    model = load_captured("mixtral", capture)
    both = Both(model, tiny.model("mixtral"), 4)
    with caplog.at_level(logging.WARNING):
        both.steps(PROVED + 3)
    assert caplog.text.count("CUDA graphs are not used") == 1, "said once"
    assert "differs from its eager twin" in caplog.text
    assert batches_of(model) == [None, None], "its memory is given back"
    captured = capture.captured
    both.steps(3)
    assert capture.captured == captured, "not tried again"
    assert all(not layer._refused for layer in cuda_layers_of(model)), "of one sequence"


@pytest.mark.parametrize("place", ["capture", "copies", "cache"])
def test_no_memory_for_graphs(
    place: str,
    load_captured: Loader,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Then steps go on eagerly, and those of another number of sequences may have graphs."""
    capture = Replayed()
    model = load_captured("mixtral", capture)
    both = Both(model, tiny.model("mixtral"), 8)
    both.steps(STEADY + 1)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        if place == "capture":
            patch.setattr(capture, "end", full)
        elif place == "copies":
            patch.setattr(torch.Tensor, "clone", full)
        else:
            patch.setattr(layer_buffers, "make_buffer", full)
        both.steps(1)
    assert "CUDA graphs are not used" in caplog.text
    both.steps(3)
    assert batches_of(model) == [None, None]
    other = Both(model, both.plain.model, 2)
    other.steps(PROVED)
    assert set(sizes_of(model)) == {2}


def test_a_hook_is_called(load_captured: Loader) -> None:
    model, plain = load_captured("mixtral", Replayed()), tiny.model("mixtral")
    both = Both(model, plain, 4)
    both.steps(PROVED)
    called: list[int] = []
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda *_: called.append(1))
    both.steps(2)
    handle.remove()
    both.steps(2)
    assert len(called) == 2
    kept: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: kept.append(args[2]))
    both.steps(2)
    handle.remove()
    assert not torch.equal(*kept), "an output is not written again"


def test_a_step_that_was_interrupted_is_run_again(load_captured: Loader) -> None:
    """At any point: while steps are counted, captured, proved and replayed."""
    model, plain = load_captured("mixtral", Replayed()), tiny.model("mixtral")
    both = Both(model, plain, 2, longest=5)
    both.steps(1)
    rng = random.Random(3)
    for _ in range(24):
        cache, held = both.ours.cache, both.ours.cache.get_seq_length()
        given = both.ours.ids, both.ours.mask
        ended(both.ours.step, rng.randrange(1, 1500), KeyboardInterrupt())
        both.ours.ids, both.ours.mask = given
        both.ours.cache = cache
        for layer in cache.layers:
            cut_entries(layer, held)
        both.steps(1)
    assert set(sizes_of(model)) == {2}
    assert operations(both.ours.step) > 1000, "interrupts fall on all of a step"


@pytest.mark.parametrize("given", ["none", "bool", "float", "one row"])
def test_masks_as_a_model_gives_them(given: str) -> None:
    """What is hidden is -inf, and so is the spare capacity."""
    state = BatchState(Replayed(), CPU, 2)
    shape = GQAShape(4, 2, 8, 12, torch.float32, 1.0)
    kernel = state.kernel_for(shape)
    assert isinstance(kernel, MaskedAttention)
    seen = torch.tensor([[False, True, True, True], [True] * 4])[:, None, None]
    masks = {
        "none": None,
        "bool": seen,
        "float": torch.zeros(2, 1, 1, 4).masked_fill(~seen, -1e9),
        "one row": seen[:1],
    }
    mask = masks[given]
    assert state.takes_mask(mask, 3)
    state.set_step(3, (torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)), mask)
    found = kernel._mask[:, 0, 0] > -1e8
    first = [given == "none", True, True, True, *[False] * 8]
    second = [given != "one row", True, True, True, *[False] * 8]
    assert found.tolist() == [first, second]


def test_masks_of_other_kinds_are_not_taken() -> None:
    state = BatchState(Replayed(), CPU, 2)
    for shape in ((2, 1, 1, 5), (2, 4, 1, 4), (1, 4), (3, 1, 1, 4), (2, 1, 2, 4)):
        assert not state.takes_mask(torch.ones(shape, dtype=torch.bool), 3)
    assert not state.takes_mask(torch.ones(2, 1, 1, 4, dtype=torch.int64), 3)
    assert not state.takes_mask({"full": None}, 3)


def test_another_mask_is_another_step() -> None:
    state = BatchState(Replayed(), CPU, 2)
    kernel = state.kernel_for(GQAShape(4, 2, 8, 12, torch.float32, 1.0))
    assert isinstance(kernel, MaskedAttention)
    embeddings = torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    mask[0, ..., 0] = False
    for given, first in ((mask, False), (None, True), (mask, False)):
        state.set_step(3, embeddings, given)
        assert (kernel._mask[0, 0, 0, 0] == 0) == first
    state.set_dummy_step(11)
    assert (kernel._mask == 0).all(), "unlike any step with padding"
    state.set_step(3, embeddings, mask)
    assert kernel._mask[0, 0, 0, 0] != 0


def test_a_mask_may_change_in_place_before_a_step_is_run_again() -> None:
    state = BatchState(Replayed(), CPU, 2)
    kernel = state.kernel_for(GQAShape(4, 2, 8, 12, torch.float32, 1.0))
    assert isinstance(kernel, MaskedAttention)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    for seen in (True, False, True):
        mask[0, ..., 0] = seen
        state.set_step(3, (torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)), mask)
        assert (kernel._mask[0, 0, 0, 0] == 0) == seen


@pytest.mark.parametrize("order", [(2, 1, 2), (1, 2, 1)])
def test_positions_of_each_sequence_or_one_for_all(order: tuple[int, ...]) -> None:
    state = BatchState(Replayed(), CPU, 2)
    for held, rows in enumerate(order, 3):
        given = torch.arange(rows * 4.0).view(rows, 1, 4) + held
        assert state.set_step(held, (given, given + 1))
        cos, sin = state.position_embeddings
        assert torch.equal(cos, given.expand(2, 1, 4)) and torch.equal(sin, cos + 1)
    for other in (torch.zeros(3, 1, 4), torch.zeros(2, 1, 5), torch.zeros(2, 4)):
        assert not state.set_step(9, (other, other))


def test_padded_prompts_differ() -> None:
    _, mask = padded(8)
    assert len({int(row.sum()) for row in mask}) == 7
