"""Narrowed rows hold the tokens that transformers' filters leave, with their probabilities."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.serve.requests import Sampling
from hybrimoe_plugin.serve.sampling.filters import Candidates, Filters, drawn, likeliest

SIZE = 6000

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 7},
    {"top_k": SIZE + 1},
    {"top_k": 1},
    {"top_k": SIZE - 9, "top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.2},
    {"top_p": 0.95, "temperature": 2.0},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"top_p": 0.7, "min_p": 0.1},
]


def row(spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * spread


def probabilities(candidates: Candidates) -> torch.Tensor:
    """[SIZE]: zero for tokens that are left out."""
    found = torch.zeros(SIZE)
    ids = torch.arange(SIZE) if candidates.ids is None else candidates.ids
    found[ids] = candidates.scores.softmax(dim=-1)
    return found


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("setting", SETTINGS)
def test_narrow_is_plain(setting: dict[str, Any], spread: float) -> None:
    filters = Filters(Sampling(**setting))
    scores = row(spread)
    narrow, plain = (probabilities(f(scores)) for f in (filters.narrow, filters.plain))
    torch.testing.assert_close(narrow, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_that_are_ruled_out_stay_so(setting: dict[str, Any]) -> None:
    scores = row(1.0)
    scores[5:] = -torch.inf
    candidates = Filters(Sampling(**setting)).narrow(scores)
    assert {drawn(candidates, number / 20) for number in range(20)} <= set(range(5))


@given(
    st.lists(st.integers(-12, 12), min_size=1, max_size=80),
    st.floats(0.0, 1.0, exclude_max=True, width=32),
)
def test_the_fewest_tokens_that_reach_the_sum(logits: list[int], mass: float) -> None:
    scores = torch.tensor(logits, dtype=torch.float32)
    kept = likeliest(scores, mass)
    ids = kept.nonzero()[:, 0]
    chances = scores.double().softmax(dim=-1)
    assert len(ids)
    assert float(chances[ids].sum()) >= mass - 1e-6
    # Without its unlikeliest token the sum would not be reached.
    assert len(ids) == 1 or float(chances[ids].sum() - chances[ids].min()) < mass + 1e-6
    assert kept.all() or chances[~kept].max() <= chances[ids].min()


def test_top_k_keeps_ties_as_transformers_does() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    ids = Filters(Sampling(top_k=2)).narrow(scores).ids
    assert ids is not None and ids.tolist() == [0, 1, 2, 3]


def test_large_logits_and_a_small_temperature_do_not_overflow() -> None:
    scores = torch.tensor([3e38, -3e38, 1.0])
    candidates = Filters(Sampling(temperature=2e-5)).narrow(scores / 2)
    assert drawn(candidates, 0.5) == 0


def test_even_numbers_give_the_probabilities() -> None:
    chances = torch.tensor([0.5, 0.0, 0.125, 0.375])
    candidates = Candidates(None, chances.log())
    counts = Counter(drawn(candidates, (i + 0.5) / 800) for i in range(800))
    assert counts == {0: 400, 2: 100, 3: 300}


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_numbers_give_tokens_that_can_be(number: float) -> None:
    scores = torch.tensor([-torch.inf, 1.0, 2.0, -torch.inf, -200.0])
    assert drawn(Candidates(None, scores), number) in (1, 2)
