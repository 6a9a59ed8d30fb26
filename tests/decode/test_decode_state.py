"""The inputs of a step at fixed addresses follow what the model gives its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from replayed import Replayed

from hybrimoe_plugin.decode.decode_state import DecodeState


def embeddings(value: float) -> torch.Tensor:
    return torch.full((1, 1, 4), float(value))


def shown(state: DecodeState) -> list[float]:
    found = state.position_embeddings
    parts = (found,) if isinstance(found, torch.Tensor) else found
    return [float(part[0, 0, 0]) for part in parts]


@pytest.fixture
def state() -> DecodeState:
    return DecodeState(Replayed(), torch.device("cpu"))


def one(*values: float) -> Any:
    return embeddings(values[0])


def pair(*values: float) -> Any:
    return tuple(map(embeddings, values))


def parts(*values: float) -> Any:
    return list(map(embeddings, values))


@pytest.mark.parametrize(("make", "count"), [(one, 1), (pair, 2), (parts, 2)])
def test_a_step_is_set_once(make: Any, count: int, state: DecodeState) -> None:
    values = [2.0, 3.0][:count]
    given = make(*values)
    for held in (5, 5, 6, 6):
        assert state.set_step(held, given)
        assert int(state.position) == held
        assert shown(state) == values
    others = make(*(value + 2 for value in values))
    assert state.set_step(6, others)
    assert shown(state) == [value + 2 for value in values]
    assert state.set_step(6, given)
    assert shown(state) == values


def test_a_list_may_change(state: DecodeState) -> None:
    given = parts(2, 3)
    assert state.set_step(5, given)
    given[1] = embeddings(4)
    assert state.set_step(5, given)
    assert shown(state) == [2, 4]


def test_a_capture_leaves_nothing_set(state: DecodeState) -> None:
    given = pair(2, 3)
    assert state.set_step(5, given)
    state.set_dummy_step(7)
    assert shown(state) == [0.5, 0.5]
    assert state.set_step(5, given)
    assert int(state.position) == 5
    assert shown(state) == [2, 3]


def test_another_kind_is_refused_and_the_first_stays_known(state: DecodeState) -> None:
    given = pair(2, 3)
    assert state.set_step(5, given)
    assert not state.set_step(5, (embeddings(1), embeddings(1)[:, :, :2]))
    assert state.set_step(5, given)
    assert shown(state) == [2, 3]
