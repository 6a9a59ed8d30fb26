"""Answers that are computed together, pass by pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch

from hybrimoe_plugin.errors import not_computed
from hybrimoe_plugin.serve.batching.delivery import Delivery
from hybrimoe_plugin.serve.batching.passes import Passes
from hybrimoe_plugin.serve.batching.pieces import PieceSize
from hybrimoe_plugin.serve.batching.sequence import Sequence
from hybrimoe_plugin.serve.requests import Observer, Reason
from hybrimoe_plugin.serve.sampling.sampler import draw

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""Passes of one sequence that may fail before its answer does."""


class Running:
    """Computes pieces of prompts and tokens of answers; of one thread.

    Args:
        model: a causal language model of transformers.
        delivery: takes the tokens.
        piece: most tokens of a prompt in one pass.
        observer: is told of every pass.

    Attributes:
        most: sequences that one pass can take.
    """

    def __init__(self, model: Any, delivery: Delivery, piece: int, observer: Observer) -> None:
        self._delivery = delivery
        self._passes = Passes(model)
        self._pieces = PieceSize(piece)
        self._observer = observer
        self._turn = 0
        self.most = self._passes.most_rows
        delivery.settle = self._passes.settle

    def begin(self, sequence: Sequence) -> None:
        """Let a sequence run."""
        try:
            self._delivery.begin(sequence)
        except Exception as error:
            self._failed([sequence], error)

    def compute(self) -> None:
        """One piece of one prompt, and one more token of every answer that has begun."""
        self._compute_piece()
        self._compute_tokens()

    def _compute_piece(self) -> None:
        """One piece of the prompt that was not served for longest."""
        running = self._delivery.sequences
        prompts = [each for each in running if not each.is_decoding]
        if not prompts:
            return
        sequence = min(prompts, key=lambda each: each.served)
        self._turn += 1
        sequence.served = self._turn
        count = sequence.pending
        if self._passes.takes_pieces:
            others_wait = len(prompts) < len(running)
            count = min(count, self._pieces.size(others_wait))
        ids = sequence.ids[sequence.computed : sequence.computed + count]
        begin = time.monotonic()
        try:
            logits = self._passes.piece(ids, sequence.cache)
        except Exception as error:
            self._failed([sequence], error)
            return
        sequence.computed += count
        seconds = time.monotonic() - begin
        self._pieces.took(count, seconds)
        self._observer.step(0, count, seconds)
        if not sequence.pending:
            self._take([sequence], logits[None])

    def _compute_tokens(self) -> None:
        """One more token of every answer that has begun."""
        rows = [each for each in self._delivery.sequences if each.is_decoding]
        if not rows:
            return
        begin = time.monotonic()
        try:
            logits = self._passes.step(
                [each.ids[-1] for each in rows],
                [each.cache for each in rows],
                [each.owner for each in rows],
            )
        except Exception as error:
            self._failed(rows, error)
            return
        for each in rows:
            each.computed += 1
        self._observer.step(len(rows), 0, time.monotonic() - begin)
        self._take(rows, logits)

    def _take(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Draw the next token of each and hand it over."""
        found = draw([each.sampler for each in sequences], logits)
        for sequence, drawn in zip(sequences, found, strict=True):
            self._delivery.take(sequence, drawn)

    def _failed(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """A pass failed, and what its caches hold is unknown: compute once more from the tokens."""
        log.warning("a pass failed: %s: %s", type(error).__name__, error)
        for sequence in sequences:
            sequence.forget_cache()
            sequence.failures += 1
            if sequence.failures < ATTEMPTS:
                self._delivery.send_back(sequence)
                continue
            self._delivery.end(sequence, Reason.FAILED, not_computed(error))
