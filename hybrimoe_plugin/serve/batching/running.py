"""Answers that are computed together, pass by pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch

from hybrimoe_plugin.errors import not_computed
from hybrimoe_plugin.serve.batching.delivery import Delivery
from hybrimoe_plugin.serve.batching.passes import Part, Passes
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
        delivery.holder = self._passes

    def begin(self, sequence: Sequence) -> None:
        """Let a sequence run."""
        try:
            self._delivery.begin(sequence)
        except Exception as error:
            self._failed([sequence], error)

    def compute(self) -> None:
        """Pieces of prompts, and one more token of every answer that has begun."""
        pieces, rows = self._next_pieces(), self._rows()
        together = self._passes.takes_parts and pieces and len(pieces) + len(rows) > 1
        # What has failed once is tried alone: it must not end others' answers.
        if together and not any(sequence.failures for sequence, _ in pieces):
            self._compute_parts(pieces, rows)
            return
        if pieces:
            self._compute_parts(pieces[:1], [])
        self._compute_tokens()

    def _rows(self) -> list[Sequence]:
        """The answers that have begun."""
        return [each for each in self._delivery.sequences if each.is_decoding]

    def _next_pieces(self) -> list[tuple[Sequence, int]]:
        """Whose prompts are computed next, and how many tokens of each.

        Those that were not served for longest, as many as a pass has room for.
        """
        running = self._delivery.sequences
        prompts = [each for each in running if not each.is_decoding]
        prompts.sort(key=lambda each: each.served)
        if not self._passes.takes_pieces:
            return [(each, each.pending) for each in prompts]
        room = self._pieces.size(len(prompts), len(running) - len(prompts))
        pieces = []
        for sequence in prompts:
            count = min(room, sequence.pending)
            if count:
                pieces.append((sequence, count))
            room -= count
        return pieces

    def _compute_parts(self, pieces: list[tuple[Sequence, int]], rows: list[Sequence]) -> None:
        """Pieces of prompts, and tokens of answers, in one pass."""
        for sequence, _ in pieces:  # behind the others
            self._turn += 1
            sequence.served = self._turn
        computed = [*pieces, *((each, 1) for each in rows)]
        sequences = [sequence for sequence, _ in computed]
        begin = time.monotonic()
        try:
            logits = self._passes.parts(
                [Part(each.next_ids(count), each.cache) for each, count in computed]
            )
        except Exception as error:
            # Answers that went well until now are not blamed.
            self._failed([sequence for sequence, _ in pieces], error)
            for row in rows:
                self._compute_again(row)
            return
        for sequence, count in computed:
            sequence.computed += count
        seconds = time.monotonic() - begin
        tokens = sum(count for _, count in pieces)
        self._pieces.took(tokens + len(rows), seconds)
        self._observer.step(len(rows), tokens, seconds)
        ready = [place for place, sequence in enumerate(sequences) if not sequence.pending]
        self._take([sequences[place] for place in ready], logits[ready])

    def _compute_tokens(self) -> None:
        """One more token of every answer that has begun."""
        rows = self._rows()
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
            sequence.failures += 1
            if sequence.failures < ATTEMPTS:
                self._compute_again(sequence)
                continue
            self._delivery.forget(sequence)
            self._delivery.end(sequence, Reason.FAILED, not_computed(error))

    def _compute_again(self, sequence: Sequence) -> None:
        """Let a sequence whose cache is of no use begin anew."""
        self._delivery.forget(sequence)
        self._delivery.send_back(sequence)
