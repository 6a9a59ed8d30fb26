"""Starting and ending answers, and handing their tokens over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore
from hybrimoe_plugin.serve.batching.sequence import Sequence
from hybrimoe_plugin.serve.requests import End, Observer, Reason
from hybrimoe_plugin.serve.sampling.sampler import Drawn

log = logging.getLogger(__name__)

WORTH_WAITING = 32
"""Tokens that a prompt leaves to another one to compute, at least."""


class Holder:
    """Who may hold parts of sequences' caches between passes; this one holds nothing."""

    def settle(self, cache: Any = None) -> None:
        """Hand back what is held, and give this cache memory of its own."""

    def forget(self, cache: Any) -> None:
        """Have nothing to do any more with a cache that is of no use."""


class Delivery:
    """The answers that are being computed, and those who wait for them.

    Args:
        prefixes: gives sequences their caches, and takes them back.
        context: most tokens of prompt and answer; None without a limit.
        requeue: takes a sequence that has lost its cache: it goes on later, from its tokens.
        observer: is told what happens.

    Attributes:
        sequences: those that run, in the order in which they began.
        holder: is asked before caches are copied, kept or forgotten.
    """

    def __init__(
        self,
        prefixes: PrefixStore,
        context: int | None,
        requeue: Callable[[Sequence], object],
        observer: Observer,
    ) -> None:
        self.sequences: list[Sequence] = []
        self.holder = Holder()
        self._prefixes = prefixes
        self._context = context
        self._requeue = requeue
        self._observer = observer

    def is_underway(self, sequence: Sequence) -> bool:
        """Whether a prompt that is being computed begins with more tokens of this one than it has
        computed yet: waiting for them is less work.
        """
        if not self._prefixes.can_branch:
            return False
        running = (each for each in self.sequences if not each.is_decoding)
        return any(_shares_more(each, sequence) for each in running)

    def begin(self, sequence: Sequence) -> None:
        """Give a sequence its cache, with what others have computed of its prompt."""
        taken = {each.owner for each in self.sequences}
        sequence.owner = next(number for number in range(len(taken) + 1) if number not in taken)
        self.sequences.append(sequence)
        self.holder.settle()
        others = [
            (each.ids[: each.computed], each.cache)
            for each in self.sequences
            if each.cache is not None
        ]
        sequence.cache, sequence.computed = self._prefixes.begin(sequence.ids, others)
        if not sequence.was_started:
            sequence.was_started = True
            waited = time.monotonic() - sequence.queued_at
            self._observer.started(sequence.request, waited, sequence.computed)
            self._tell(sequence, lambda: sequence.sink.started(sequence.computed))

    def take(self, sequence: Sequence, drawn: Drawn | HybriMoEError) -> bool:
        """Hand the next token over, or end the answer; whether it goes on."""
        if isinstance(drawn, HybriMoEError):
            self.forget(sequence)  # its cache may be what is wrong: nobody else must get it
            self.end(sequence, Reason.FAILED, drawn)
            return False
        if drawn.kept and not self._hand_over(sequence, drawn):
            return False
        if drawn.last:
            self.end(sequence, Reason.STOP)
            return False
        if sequence.given == sequence.request.max_tokens or self._is_full(sequence):
            self.end(sequence, Reason.LENGTH)
            return False
        return True

    def end_cancelled(self) -> None:
        """End the answers that nobody wants any more."""
        for sequence in [each for each in self.sequences if each.is_cancelled]:
            self.end(sequence, Reason.CANCELLED)

    def end(self, sequence: Sequence, reason: Reason, error: BaseException | None = None) -> None:
        """End an answer, and keep what was computed for the next turn of its conversation."""
        self.sequences.remove(sequence)
        self._give_back(sequence)
        finish(sequence, reason, error, self._observer)

    def send_back(self, sequence: Sequence) -> None:
        """Let an answer wait; what was computed of it is kept where there is room."""
        self.sequences.remove(sequence)
        self._give_back(sequence)
        sequence.forget_cache()
        self._requeue(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Drop the cache of a sequence, which is of no use."""
        cache = sequence.cache
        sequence.forget_cache()
        if cache is not None:
            self.holder.forget(cache)

    def keep(self, ids: list[int], cache: Any) -> None:
        """Keep a cache that nobody uses any more, for prompts that begin with the same tokens."""
        try:
            self.holder.settle(cache)
            self._prefixes.end(ids, cache)
        except Exception as error:  # out of memory: only time is lost
            log.warning("a prefix was not kept: %s: %s", type(error).__name__, error)

    def _hand_over(self, sequence: Sequence, drawn: Drawn) -> bool:
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

    def _give_back(self, sequence: Sequence) -> None:
        cache, sequence.cache = sequence.cache, None
        if cache is not None:
            self.keep(sequence.ids[: sequence.computed], cache)


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


def _shares_more(running: Sequence, waiting: Sequence) -> bool:
    """Whether two sequences begin alike for longer than the first one has been computed."""
    ours, theirs = running.ids, waiting.ids
    # The last token of a prompt is always computed: its logits are wanted.
    last = running.computed + WORTH_WAITING
    if last >= min(len(ours), len(theirs) - 1) or ours[last] != theirs[last]:
        return False
    return ours[: last + 1] == theirs[: last + 1]
