"""Sampling by speculation draws from the target's own distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lever_ext.decoding import LeverDecoding
from lever_ext.target import load_target
from lever_ext.tree.policies import FixedBudget
from tests.lever.helpers import (
    a_gate,
    make_draft,
    prompt,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"repetition_penalty": 1.4},
        {
            "temperature": 1.3,
            "top_k": 20,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "no_repeat_ngram_size": 3,
        },
    ],
)
def test_sampling_with_a_seed_draws_what_generate_draws(
    options: dict[str, Any], plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    plain, settings = (
        plain_models["llama"],
        {"do_sample": True, "max_new_tokens": 20, "top_k": 0, **options},
    )
    target = load_target(packs["llama"])
    target.set_gate(a_gate(plain))
    for seed in range(4):
        torch.manual_seed(seed)
        want = plain.generate(prompt(seed), **settings)
        decoder = LeverDecoding(
            make_draft("low-bit", plain), FixedBudget(12), target, prune="always"
        )
        torch.manual_seed(seed)
        assert torch.equal(
            target.model.generate(prompt(seed), custom_generate=decoder, **settings), want
        )
    target.close()


@pytest.mark.slow
def test_sampled_pairs_follow_the_targets_distribution(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    """Chi-square of the third token given the first two, with pruning: conditional on nothing but
    the prompt's path.
    """
    plain = plain_models["llama"]
    target = load_target(packs["llama"])
    target.set_gate(a_gate(plain, threshold=0.3))
    decoder = LeverDecoding(make_draft("low-bit", plain), FixedBudget(10), target, prune="always")
    ids, settings = (
        prompt(11),
        {"do_sample": True, "top_k": 3, "max_new_tokens": 2, "min_new_tokens": 2},
    )
    torch.manual_seed(0)
    counts: dict[tuple[int, int], int] = {}
    draws = 500
    for _ in range(draws):
        pair = tuple(
            target.model.generate(ids, custom_generate=decoder, **settings)[0, -2:].tolist()
        )
        counts[pair] = counts.get(pair, 0) + 1
    expected = exact_pairs(plain, ids)
    assert set(counts) <= set(expected)
    pairs = sorted(expected)
    drawn, wanted = ([values.get(pair, 0.0) for pair in pairs] for values in (counts, expected))
    assert chi_square_p(drawn, [share * draws for share in wanted]) > 1e-3
    target.close()


def chi_square_p(counts: Sequence[float], expected: Sequence[float]) -> float:
    """Chance of a chi-square statistic at least as large as that of the counts."""
    statistic = sum(
        (count - want) ** 2 / want for count, want in zip(counts, expected, strict=True)
    )
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def exact_pairs(plain: Any, ids: torch.Tensor) -> dict[tuple[int, int], float]:
    """Probability of every pair of tokens under top-k 3 and no end token."""

    def top(prefix: torch.Tensor) -> dict[int, float]:
        with torch.no_grad():
            logits = plain(prefix).logits[0, -1].clone()
        logits[2] = -torch.inf
        values, tokens = logits.topk(3)
        return dict(zip(tokens.tolist(), torch.softmax(values, 0).tolist(), strict=True))

    pairs = {}
    for first, share in top(ids).items():
        for second, then in top(torch.cat([ids, torch.tensor([[first]])], 1)).items():
            pairs[first, second] = share * then
    return pairs
