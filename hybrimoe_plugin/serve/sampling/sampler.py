"""Draws the next tokens of several answers, each in its own way.

draw(samplers, logits)   pick, for every row: nothing changes
                         take, for every row: the sampler remembers its token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.errors import HybriMoEError, InputError
from hybrimoe_plugin.serve.requests import PromptError, Request, Token
from hybrimoe_plugin.serve.sampling.checks import check_sampling
from hybrimoe_plugin.serve.sampling.errors import DrawError
from hybrimoe_plugin.serve.sampling.filters import GREEDY_BELOW, Filters, drawn
from hybrimoe_plugin.serve.sampling.penalties import AnswerPenalties, Biases

_SEEDS = 1 << 64
"""torch's generators take so many seeds; other integers are taken modulo it."""


class Drawn(NamedTuple):
    """What one row gave.

    Attributes:
        token: what was drawn.
        kept: whether it is part of the answer; one that ends the text is not.
        last: whether the answer ends with it. A token that completes a grammar is both.
    """

    token: Token
    kept: bool
    last: bool


class Sampler:
    """How one answer's tokens are drawn, and what is remembered of those that were.

    For one thread at a time. Random numbers come from a generator of its own on the CPU: a seed
    gives the same answer, whatever else is computed, as long as the logits are the same.

    Attributes:
        vocabulary: how many logits a row has.
        ends: tokens that end the answer.
    """

    def __init__(self, model: Any, request: Request) -> None:
        """Prepare to draw.

        Args:
            model: of transformers; its config tells the vocabulary, its `generation_config` which
                tokens end a text.

        Raises:
            SamplingError: the request's `sampling` has values that make no sense.
            PromptError: the prompt has tokens that the model does not have.
        """
        sampling = request.sampling
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        check_sampling(sampling, self.vocabulary)
        of_model = () if sampling.ignore_eos else _end_tokens(model)
        self.ends = frozenset((*of_model, *sampling.stop_token_ids))
        self._greedy = sampling.temperature < GREEDY_BELOW
        self._logprobs = sampling.logprobs
        self._min_tokens = sampling.min_tokens
        self._count = 0
        self._filters = Filters(sampling)
        self._penalties: AnswerPenalties | None = None
        self._seen: torch.Tensor | None = None
        self._processors = self._processors_of(request)
        self._hold_back = self._end_suppressor()
        self._matcher = None if sampling.grammar is None else sampling.grammar.matcher()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % _SEEDS)
        self._number = self._next_number()

    def _processors_of(self, request: Request) -> list[Any]:
        """What changes logits before temperature and filters, in the order of `generate`."""
        from transformers.generation import logits_process as processors

        sampling = request.sampling
        made: list[Any] = []
        if sampling.logit_bias:
            made.append(Biases(sampling.logit_bias))
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(request.prompt, dtype=torch.long).unique()
            if len(seen) and not (seen[0] >= 0 and seen[-1] < self.vocabulary):
                raise PromptError(f"the prompt has tokens beyond {self.vocabulary - 1}")
            self._seen = seen[None]
            penalty = float(sampling.repetition_penalty)
            made.append(processors.RepetitionPenaltyLogitsProcessor(penalty))
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._penalties = AnswerPenalties(
                float(sampling.presence_penalty),
                float(sampling.frequency_penalty),
                self.vocabulary,
            )
            made.append(self._penalties)
        return made

    def _end_suppressor(self) -> Any:
        from transformers.generation.logits_process import SuppressTokensLogitsProcessor

        inside = sorted(token for token in self.ends if token < self.vocabulary)
        return SuppressTokensLogitsProcessor(inside) if inside else None

    def _next_number(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    @property
    def _is_plain(self) -> bool:
        """Whether the likeliest token is all that the next step needs."""
        return (
            self._greedy
            and not self._processors
            and self._matcher is None
            and self._logprobs is None
            and self._count >= self._min_tokens
        )

    def _pick(self, row: torch.Tensor, highest: float, likeliest: int) -> Token:
        """The next token. Changes nothing, so that the same call gives the same token.

        Args:
            row: [V], any floating-point type and device.
            highest: its largest value, not a number if any is not.
            likeliest: the index of that value.

        Raises:
            DrawError, GrammarError: nothing can be drawn.
        """
        if len(row) != self.vocabulary:
            raise DrawError(f"{len(row)} logits came for a vocabulary of {self.vocabulary}")
        if not math.isfinite(highest):
            raise DrawError(f"the model computed logits that are no numbers ({highest})")
        if self._is_plain:
            return Token(likeliest)
        logits = row.detach().cpu().float()
        scores = self._scores(logits)
        top, best = scores.max(dim=-1)
        if not math.isfinite(float(top)):
            raise DrawError("bias, penalties and grammar leave no token that could be drawn")
        token = int(best) if self._greedy else drawn(self._filters.narrow(scores), self._number)
        return self._told(token, logits)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V] after everything that comes before temperature and filters."""
        scores = logits[None]
        if self._matcher is not None:
            allowed = self._matcher.allowed(self.vocabulary, self.ends)
            scores = scores.masked_fill(~allowed, -torch.inf)
        for processor in self._processors:
            scores = processor(self._seen, scores)
        if self._hold_back is not None and self._count < self._min_tokens:
            held = self._hold_back(None, scores)
            # A grammar that is complete allows nothing else than the end.
            scores = held if bool(held.max() > -torch.inf) else scores
        return scores[0]

    def _told(self, token: int, logits: torch.Tensor) -> Token:
        """The token with the log-probabilities that were asked for, of the model's own logits."""
        if self._logprobs is None:
            return Token(token)
        logprobs = logits.log_softmax(dim=-1)
        best, ids = torch.topk(logprobs, min(self._logprobs, len(logprobs)))
        pairs = zip(ids.tolist(), best.tolist(), strict=True)
        top = tuple((index, value) for index, value in pairs if value > -math.inf)
        return Token(token, float(logprobs[token]), top)

    def _take(self, token: Token) -> Drawn:
        """Remember a token.

        Raises:
            GrammarError: the grammar has become too complex.
        """
        if token.id in self.ends:
            return Drawn(token, kept=False, last=True)
        over = False
        if self._matcher is not None:  # first, because it can fail
            over = self._matcher.take(token.id)
        if self._penalties is not None:
            self._penalties.add(token.id)
        if self._seen is not None and not bool((self._seen == token.id).any()):
            self._seen = torch.cat([self._seen, torch.tensor([[token.id]])], dim=1)
        if not self._greedy:
            self._number = self._next_number()
        self._count += 1
        return Drawn(token, kept=True, last=over)


def draw(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[Drawn | HybriMoEError]:
    """The next token of every answer; samplers remember theirs once all rows are chosen.

    Args:
        logits: [R, V], a row for each sampler; any floating-point type and device.

    Returns:
        One for each row: what was drawn, or why this answer cannot go on. A sampler whose row is
        an error has not changed, unless its grammar failed, for good; others are not affected.

    Raises:
        InputError: the shape is wrong.
    """
    if logits.dim() != 2 or len(logits) != len(samplers) or not logits.shape[1]:
        raise InputError(f"logits of shape {tuple(logits.shape)} came for {len(samplers)} answers")
    # Not `argmax`, which is slower; one that is not a number counts as the largest.
    highest, likeliest = (found.tolist() for found in logits.max(dim=-1))
    picked: list[Token | HybriMoEError] = []
    for index, sampler in enumerate(samplers):
        try:
            picked.append(sampler._pick(logits[index], highest[index], likeliest[index]))
        except Exception as error:
            picked.append(_typed(error))
    return [_taken(sampler, found) for sampler, found in zip(samplers, picked, strict=True)]


def _taken(sampler: Sampler, found: Token | HybriMoEError) -> Drawn | HybriMoEError:
    if isinstance(found, HybriMoEError):
        return found
    try:
        return sampler._take(found)
    except Exception as error:
        return _typed(error)


def _typed(error: Exception) -> HybriMoEError:
    """Whatever happens in one row is that row's alone."""
    if isinstance(error, HybriMoEError):
        return error
    made = DrawError(f"a token could not be drawn ({type(error).__name__}: {error})")
    made.__cause__ = error
    return made


def _end_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that end a text of this model."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
