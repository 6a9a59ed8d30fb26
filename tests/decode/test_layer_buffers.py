"""A layer's buffers: what is seen of them, and what a step leaves that is cut off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from graphed import Loader, Sequence, greedy
from replayed import Replayed

from hybrimoe_plugin.compute.attention.kv_cache import Buffers, GrowingLayer, make_buffer
from hybrimoe_plugin.decode.cuda_layer import PROOFS


def test_an_interrupted_move_leaves_the_others_alone(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence lies in a layer's buffers; the step of another one is cut off while it takes its
    place.
    """
    model, steps = load_captured("mixtral", Replayed()), PROOFS + 5
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


def layer(tokens: int, capacity: int) -> tuple[GrowingLayer, Buffers]:
    """A layer that lies in buffers for graphs, each token of which is full of its number."""
    made = GrowingLayer()
    states = torch.arange(tokens, dtype=torch.float32).expand(1, 2, 3, tokens).transpose(2, 3)
    made.update(states, states + 100)
    buffers = make_buffer(states, capacity), make_buffer(states, capacity)
    made.move(buffers)
    return made, buffers


def test_keys_and_values_are_what_replays_have_written() -> None:
    made, (keys, values) = layer(4, 8)
    for token in (4, 5):
        keys[:, :, token], values[:, :, token] = token, token + 100
        made.advance()
        assert made.get_seq_length() == token + 1
    assert made.keys.data_ptr() == keys.data_ptr()
    assert made.keys is made.keys
    for found, first in ((made.keys, 0), (made.values, 100)):
        assert found.shape == (1, 2, 6, 3)
        assert found[0, 0, :, 0].tolist() == list(range(first, first + 6))


def test_what_others_put_in_their_place_counts() -> None:
    made, buffers = layer(4, 8)
    made.advance()
    made.keys = made.keys[:, :, :3]
    made.values = made.values[:, :, :3]
    assert made.get_seq_length() == made.values.shape[2] == 3
    assert made.lies_in(buffers), "a crop"
    made.keys = made.keys.clone()
    assert not made.lies_in(buffers)
    assert made.values.data_ptr() == buffers[1].data_ptr()
    made.move(buffers)
    assert made.lies_in(buffers)
    made.advance()
    assert made.keys.shape == made.values.shape == (1, 2, 4, 3)
    made.reset()
    assert made.keys is None and made.values is None
    assert made.get_seq_length() == 0 and not made.lies_in(buffers)


def test_one_of_both_may_be_replaced_before_either_was_asked_for() -> None:
    made, (keys, values) = layer(4, 8)
    made.advance()
    made.advance()
    other = torch.zeros(1, 2, 6, 3)
    made.values = other
    assert made.values is other
    assert made.keys.shape == other.shape and made.keys.data_ptr() == keys.data_ptr()


def test_buffers_that_were_left_are_not_kept() -> None:
    made, buffers = layer(4, 8)
    made.advance()
    assert made.keys.shape[2] == 5
    left = [buffer.untyped_storage()._cdata for buffer in buffers]
    made.leave()
    tensors = [value for value in vars(made).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 2
    assert not {tensor.untyped_storage()._cdata for tensor in tensors} & set(left)


def test_a_copy_and_a_cut_leave_the_buffers_alone() -> None:
    made, (keys, _) = layer(4, 8)
    made.advance()
    other = copy.copy(made)
    assert other.get_seq_length() == 5
    assert other.keys.data_ptr() != keys.data_ptr()
    made.cut(2)
    assert made.get_seq_length() == made.keys.shape[2] == made.values.shape[2] == 2
    made.cut(4)
    assert made.get_seq_length() == 2
    state = torch.full((1, 2, 1, 3), 7.0)
    assert made.update(state, state)[0].shape[2] == 3
    assert other.keys.shape[2] == other.values.shape[2] == 5
    assert other.update(state, state)[0][0, 0, :, 0].tolist() == [0, 1, 2, 3, 0, 7]
