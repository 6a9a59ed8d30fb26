"""Temperature, top-k, top-p and min-p, as transformers applies them, and drawing.

The filters of transformers keep rows as long as the vocabulary, and sort all of it for top-p.
Here top-k narrows a row to its few tokens first, and top-p alone sorts in a faster way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from hybrimoe_plugin.serve.requests import Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below it count as 0: logits would overflow when they are divided by it."""


class Candidates(NamedTuple):
    """The tokens of one row that may be drawn.

    Attributes:
        ids: [N] int64, ascending; None where the row was not narrowed.
        scores: [N] float32 logits, minus infinity for tokens that are left out.
    """

    ids: torch.Tensor | None
    scores: torch.Tensor


class Filters:
    """The filters of one request. They hold no state."""

    def __init__(self, sampling: Sampling) -> None:
        from transformers.generation import logits_process as processors

        self._top_k = sampling.top_k
        self._top_p = float(sampling.top_p)
        self._temperature: list[Any] = []
        self._limit: list[Any] = []
        self._nucleus: list[Any] = []
        self._floor: list[Any] = []
        if sampling.temperature != 1.0 and sampling.temperature >= GREEDY_BELOW:
            warper = processors.TemperatureLogitsWarper(float(sampling.temperature))
            self._temperature = [warper]
        if sampling.top_k:
            self._limit = [processors.TopKLogitsWarper(sampling.top_k)]
        if sampling.top_p < 1.0:
            self._nucleus = [processors.TopPLogitsWarper(self._top_p)]
        if sampling.min_p:
            self._floor = [processors.MinPLogitsWarper(float(sampling.min_p))]

    def plain(self, scores: torch.Tensor) -> Candidates:
        """transformers' processors in its order, over the whole row.

        Args:
            scores: [V] float32, with a finite maximum.
        """
        filters = [*self._temperature, *self._limit, *self._nucleus, *self._floor]
        return Candidates(None, _run(filters, scores))

    def narrow(self, scores: torch.Tensor) -> Candidates:
        """The same tokens as `plain`, sooner.

        Of tokens with the same logit at the border of top-p it may keep others, and rounding may
        decide about one there.
        """
        # Below the largest one, as large logits would overflow at a small temperature.
        scores = _run(self._temperature, scores - scores.max())
        ids = None
        if 0 < self._top_k < len(scores):
            ids = _best(scores, self._top_k)
            scores = scores[ids]
        if self._nucleus:
            scores = scores.masked_fill(~likeliest(scores, self._top_p), -torch.inf)
        return Candidates(ids, _run(self._floor, scores))


def likeliest(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """The fewest tokens whose probabilities reach a sum, at least one: [V] bool.

    numpy sorts values by vector instructions, where torch moves indices along: 0.4 and 10 ms for
    151,936 tokens. So values alone are sorted, and the border among them tells the tokens.

    Args:
        scores: [V] float32, on the CPU.
        mass: at least 0 and below 1.
    """
    chances = scores.softmax(dim=-1)
    falling = torch.from_numpy(np.sort(chances.numpy())).flip(0)
    sums = falling.cumsum(dim=-1, dtype=torch.float64)
    # A token is needed if those above it do not reach the sum yet.
    count = 1 + int(torch.searchsorted(sums[:-1], sums[-1] * mass))
    border = falling[count - 1]
    kept = chances > border
    # Of those that tie at the border, as many as it takes.
    ties = (chances == border).nonzero()[:, 0]
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def drawn(candidates: Candidates, number: float) -> int:
    """The token at which the sum of probabilities passes a number.

    Args:
        candidates: with a finite maximum.
        number: at least 0 and below 1; where it is uniform, tokens have their probabilities.
    """
    sums = candidates.scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # Rounding must not put the point at the end, after the last token with a probability.
    point = (sums[-1] * number).clamp(max=torch.nextafter(sums[-1], torch.zeros_like(sums[-1])))
    # The first token whose sum lies above the point: not one without a probability.
    index = int(torch.searchsorted(sums, point, right=True))
    return index if candidates.ids is None else int(candidates.ids[index])


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the highest scores, ascending: more than asked for where the last ones tie."""
    border = torch.topk(scores, count).values[-1]
    return ((scores >= border) & (scores > -torch.inf)).nonzero()[:, 0]


def _run(processors: list[Any], scores: torch.Tensor) -> torch.Tensor:
    for processor in processors:
        scores = processor(None, scores[None])[0]
    return scores
