"""Answers by a custom decoding method of `generate`, such as speculation: one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.errors import HybriMoEError, not_computed
from hybrimoe_plugin.serve.batching.delivery import Delivery
from hybrimoe_plugin.serve.batching.sequence import Sequence
from hybrimoe_plugin.serve.requests import Reason
from hybrimoe_plugin.serve.sampling.sampler import Drawn, draw


class Speculating:
    """Runs one answer whole, as `generate` does; of one thread.

    The method asks processors for the scores of every token of the text, once and in order. So the
    request's own sampler sits among them: it draws the token, and leaves it as the only one that
    can be chosen. That keeps seeds, grammars and log-probabilities what they are elsewhere.

    Args:
        model: a causal language model of transformers.
        delivery: takes the tokens.
        decoder: a callable for `custom_generate`, with an attribute `streamer`.
        between: called between two tokens, as an answer holds the thread until it ends.

    Attributes:
        most: answers at once.
    """

    most = 1

    def __init__(
        self, model: Any, delivery: Delivery, decoder: Any, between: Callable[[], object]
    ) -> None:
        self._model = model
        self._delivery = delivery
        self._decoder = decoder
        self._between = between

    def begin(self, sequence: Sequence) -> None:
        """Let a sequence run."""
        try:
            self._delivery.begin(sequence)
        except Exception as error:
            self._failed(sequence, error)

    def compute(self) -> None:
        """The whole answer of the sequence that runs, if there is one."""
        if not self._delivery.sequences:
            return
        sequence = self._delivery.sequences[0]
        try:
            self._generate(sequence)
        except Exception as error:
            self._failed(sequence, error)

    def _generate(self, sequence: Sequence) -> None:
        prompt = torch.tensor([sequence.ids], device=self._model.device)
        progress = _Progress(sequence, self._delivery, self._between)
        # Not the sequence's while the method runs: it holds drafted tokens too, and the text may
        # end before these are dropped.
        cache, sequence.cache = sequence.cache, None
        self._decoder.streamer = progress
        try:
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=self._config(sequence),
                logits_processor=[progress.choose],
                stopping_criteria=[progress.stopped],
                custom_generate=self._decoder,
                **{cache_name(self._model): cache},
            )
        finally:
            self._decoder.streamer = None
        self._delivery.keep(sequence.ids[:-1], cache)
        if sequence in self._delivery.sequences:
            cancelled = sequence.is_cancelled
            self._delivery.end(sequence, Reason.CANCELLED if cancelled else Reason.LENGTH)

    def _config(self, sequence: Sequence) -> Any:
        """Lets `generate` choose the only token that is left, and end by the criterion alone."""
        from transformers import GenerationConfig

        vocabulary = sequence.sampler.vocabulary
        most = sequence.request.max_tokens
        if most is None:
            most = self._model.config.max_position_embeddings
        return GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=most,
            eos_token_id=vocabulary,
            pad_token_id=0,
        )

    def _failed(self, sequence: Sequence, error: Exception) -> None:
        if sequence not in self._delivery.sequences:
            return
        told = error if isinstance(error, HybriMoEError) else not_computed(error)
        self._delivery.end(sequence, Reason.FAILED, told)


class _Progress:
    """Draws an answer's tokens and hands them over, as `generate` asks and tells."""

    def __init__(
        self, sequence: Sequence, delivery: Delivery, between: Callable[[], object]
    ) -> None:
        self._sequence = sequence
        self._delivery = delivery
        self._between = between
        self._drawn: Drawn | None = None
        self._goes_on = True

    def choose(self, _ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] that leave the drawn token alone."""
        drawn = draw([self._sequence.sampler], logits)[0]
        if isinstance(drawn, HybriMoEError):
            raise drawn
        self._drawn = drawn
        scores = torch.full_like(logits, -torch.inf)
        scores[0, drawn.token.id] = 0.0
        return scores

    def put(self, _ids: torch.Tensor) -> None:
        """The token that was drawn is part of the text now; called for the prompt too."""
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return
        self._goes_on = self._delivery.take(self._sequence, drawn)

    def end(self) -> None:
        """All tokens are there."""

    def stopped(self, ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        """Whether to end, [1] bool."""
        self._between()
        over = not self._goes_on or self._sequence.is_cancelled
        return torch.full((len(ids),), over, dtype=torch.bool, device=ids.device)
