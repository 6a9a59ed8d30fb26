"""The answers that are being computed, and their passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hybrimoe_plugin.errors import BackendError, HybriMoEError
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore
from hybrimoe_plugin.serve.batching.passes import Passes
from hybrimoe_plugin.serve.batching.pieces import PieceSize
from hybrimoe_plugin.serve.batching.sequence import Sequence
from hybrimoe_plugin.serve.requests import End, Observer, Reason
from hybrimoe_plugin.serve.sampling.sampler import Drawn, draw

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""Passes of one sequence that may fail before its answer does."""


class Running:
    """Computes pieces of prompts and tokens of answers; of one thread.

    Args:
        model: a causal language model of transformers.
        prefixes: gives sequences their caches, and takes them back.
        context: most tokens of prompt and answer; None without a limit.
        piece: most tokens of a prompt in one pass.
        requeue: takes a sequence that has lost its cache: it goes on later, from its tokens.
        observer: is told what happens.

    Attributes:
        sequences: those that run, in the order in which they began.
    """

    def __init__(
        self,
        model: Any,
        prefixes: PrefixStore,
        context: int | None,
        piece: int,
        requeue: Callable[[Sequence], object],
        observer: Observer,
    ) -> None:
        self.sequences: list[Sequence] = []
        self._prefixes = prefixes
        self._passes = Passes(model)
        self._pieces = PieceSize(piece)
        self._context = context
        self._requeue = requeue
        self._observer = observer
        self._turn = 0

    @property
    def most_rows(self) -> int:
        """Sequences that one pass can take."""
        return self._passes.most_rows

    def begin(self, sequence: Sequence) -> None:
        """Give a sequence its cache, with what others have computed of its prompt."""
        taken = {each.owner for each in self.sequences}
        sequence.owner = next(number for number in range(len(taken) + 1) if number not in taken)
        self.sequences.append(sequence)
        self._passes.settle()
        others = [
            (each.ids[: each.computed], each.cache)
            for each in self.sequences
            if each.cache is not None
        ]
        try:
            sequence.cache, sequence.computed = self._prefixes.begin(sequence.ids, others)
        except Exception as error:
            self._failed([sequence], error)
            return
        if not sequence.was_started:
            sequence.was_started = True
            waited = time.monotonic() - sequence.queued_at
            self._observer.started(sequence.request, waited, sequence.computed)
            self._tell(sequence, lambda: sequence.sink.started(sequence.computed))

    def compute_piece(self) -> None:
        """One piece of the prompt that was not served for longest."""
        prompts = [each for each in self.sequences if not each.is_decoding]
        if not prompts:
            return
        sequence = min(prompts, key=lambda each: each.served)
        self._turn += 1
        sequence.served = self._turn
        count = sequence.pending
        if self._passes.takes_pieces:
            others_wait = len(prompts) < len(self.sequences)
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

    def compute_tokens(self) -> None:
        """One more token of every answer that has begun."""
        rows = [each for each in self.sequences if each.is_decoding]
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

    def end_cancelled(self) -> None:
        """End the answers that nobody wants any more."""
        for sequence in [each for each in self.sequences if each.is_cancelled]:
            self.end(sequence, Reason.CANCELLED)

    def send_last_back(self) -> None:
        """Take the cache of the answer that began last; it waits until there is room again."""
        sequence = self.sequences[-1]
        log.info("%s: waits for KV memory", sequence.request.id)
        self._keep(sequence)
        self._send_back(sequence)

    def end(self, sequence: Sequence, reason: Reason, error: BaseException | None = None) -> None:
        """End an answer, and keep what was computed for the next turn of its conversation."""
        if sequence in self.sequences:
            self.sequences.remove(sequence)
        self._keep(sequence)
        finish(sequence, reason, error, self._observer)

    def _take(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Draw the next token of each and hand it over."""
        found = draw([each.sampler for each in sequences], logits)
        for sequence, drawn in zip(sequences, found, strict=True):
            if isinstance(drawn, HybriMoEError):
                self.end(sequence, Reason.FAILED, drawn)
                continue
            if drawn.kept and not self._hand_over(sequence, drawn):
                continue
            if drawn.last:
                self.end(sequence, Reason.STOP)

    def _hand_over(self, sequence: Sequence, drawn: Drawn) -> bool:
        """Give a token to whoever waits for it; whether the answer goes on."""
        now = time.monotonic()
        if sequence.given:
            self._observer.next_token(sequence.request, now - sequence.last_at)
        else:
            self._observer.first_token(sequence.request, now - sequence.queued_at)
        sequence.last_at = now
        sequence.ids.append(drawn.token.id)
        sequence.given += 1
        goes_on = self._tell(sequence, lambda: sequence.sink.put(drawn.token))
        if sequence not in self.sequences:
            return False  # the sink has failed
        if not goes_on:
            self.end(sequence, Reason.STOP)
            return False
        is_last = sequence.given == sequence.request.max_tokens or self._is_full(sequence)
        if is_last and not drawn.last:
            self.end(sequence, Reason.LENGTH)
            return False
        return True

    def _is_full(self, sequence: Sequence) -> bool:
        return self._context is not None and len(sequence.ids) >= self._context

    def _tell(self, sequence: Sequence, call: Callable[[], Any]) -> Any:
        """What a sink says; an answer whose sink raises is ended."""
        try:
            return call()
        except Exception as error:
            log.exception("%s: its answer cannot be delivered", sequence.request.id)
            self.end(sequence, Reason.FAILED, error)
            return None

    def _failed(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """A pass failed, and what its caches hold is unknown: compute once more from the tokens."""
        self._passes.forget()
        kind = type(error).__name__
        log.warning("a pass failed: %s: %s", kind, error)
        for sequence in sequences:
            sequence.forget_cache()
            sequence.failures += 1
            if sequence.failures < ATTEMPTS:
                self._send_back(sequence)
                continue
            told = BackendError(f"the answer could not be computed: {kind}: {error}")
            self.end(sequence, Reason.FAILED, told)

    def _send_back(self, sequence: Sequence) -> None:
        sequence.forget_cache()
        self.sequences.remove(sequence)
        self._requeue(sequence)

    def _keep(self, sequence: Sequence) -> None:
        """Let the next turn of a conversation begin where this one ends."""
        if sequence.cache is None:
            return
        self._passes.settle()
        cache, sequence.cache = sequence.cache, None
        try:
            self._prefixes.end(sequence.ids[: sequence.computed], cache)
        except Exception as error:  # out of memory: only time is lost
            log.warning("a prefix was not kept: %s: %s", type(error).__name__, error)


def finish(
    sequence: Sequence, reason: Reason, error: BaseException | None, observer: Observer
) -> None:
    """Tell whoever waits for an answer that it has ended."""
    end = End(reason, sequence.given, error)
    observer.ended(sequence.request, end, time.monotonic() - sequence.queued_at)
    try:
        sequence.sink.end(end)
    except Exception:
        log.exception("%s: its end cannot be told", sequence.request.id)
