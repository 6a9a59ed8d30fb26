"""Which answers are computed: the queue, and the thread that owns the model."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import torch

from hybrimoe_plugin.compute.cpu.openmp import release_team
from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.files import human
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore
from hybrimoe_plugin.serve.batching.delivery import Delivery, finish
from hybrimoe_plugin.serve.batching.memory import KVMemory
from hybrimoe_plugin.serve.batching.running import Running
from hybrimoe_plugin.serve.batching.sequence import Sequence
from hybrimoe_plugin.serve.batching.speculating import Speculating
from hybrimoe_plugin.serve.requests import (
    ClosingError,
    Load,
    Observer,
    PromptError,
    QueueFullError,
    Reason,
    Request,
    Sink,
)
from hybrimoe_plugin.serve.sampling.sampler import Sampler

log = logging.getLogger(__name__)

FEWEST_TOKENS = 16
"""Of prompt and answer together, for which a server is worth starting."""

_SHUT_DOWN = "the server is being shut down"
_POLL_SECONDS = 0.1


class Scheduler:
    """Computes answers together, fairly, within limits of memory.

    Every turn of the loop takes one more token of every answer that has begun, and as much of the
    prompts as may delay them. Here D comes while A, B and C are answered, and its prompt has three
    pieces; in the second line for models that cannot take both in one pass:

        passes    | D 1/3 A B C | D 2/3 A B C | D 3/3 A B C | A B C D | A B C D | ...
        passes    | D 1/3 | A B C | D 2/3 | A B C | D 3/3 | A B C D | A B C D | ...

    So a long prompt delays the others by one piece for each token, and waits for nobody's end.
    Several prompts share passes, or take turns by pieces.

    Where the KV memory runs out, the answer that began last goes back to the head of the queue: it
    is computed again from its tokens, and goes on.

    Args:
        model: a causal language model of transformers, injected or not.
        batch: most answers that are computed at once.
        queue: most requests that wait.
        kv_bytes: most memory for the caches of running answers; None for a share of what is free.
        prefix_bytes: most memory for prefixes of former answers.
        piece: most tokens of a prompt in one pass.
        context: most tokens of prompt and answer; None for the model's own limit.
        observer: is told what happens.
        decoder: a custom decoding method for `generate`, with an attribute `streamer`; answers are
            then computed one after the other.

    Attributes:
        context: most tokens of prompt and answer: what was asked for, or less where the model or
            the memory sets a lower limit.
        failed: what ended the thread, if anything did.

    Raises:
        BudgetError: the memory for KV caches holds hardly a prompt.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int,
        queue: int,
        kv_bytes: int | None,
        prefix_bytes: int,
        piece: int,
        context: int | None = None,
        observer: Observer | None = None,
        decoder: Any = None,
    ) -> None:
        self._model = model
        self._observer = observer or Observer()
        self._memory = KVMemory(model, kv_bytes)
        positions = getattr(model.config, "max_position_embeddings", None)
        limits = [self._memory.tokens, *(limit for limit in (positions, context) if limit)]
        self.context: int | None = min(limits)
        if self._memory.tokens < FEWEST_TOKENS:
            needed = human(self._memory.of(FEWEST_TOKENS))
            raise BudgetError(
                f"{human(self._memory.limit)} for KV caches leave no room for a prompt and its "
                f"answer: {needed} hold {FEWEST_TOKENS} tokens"
            )
        self._prefixes = PrefixStore(model, prefix_bytes)
        self._delivery = Delivery(self._prefixes, self.context, self._requeue, self._observer)
        self._answers: Running | Speculating = (
            Running(model, self._delivery, piece, self._observer)
            if decoder is None
            else Speculating(model, self._delivery, decoder, self._clear_queue)
        )
        self._most_running = min(batch, self._answers.most)
        self._most_waiting = queue
        self._waiting: deque[Sequence] = deque()
        self._changed = threading.Condition()
        """Held while the queue is read or changed; told when there is something to do."""
        self._closing = False
        self.failed: BaseException | None = None
        release_team()  # this thread may have loaded the model, and computes no more
        self._thread = threading.Thread(
            target=self._run, args=(torch.get_num_threads(),), name="scheduler", daemon=True
        )
        self._thread.start()

    @property
    def together(self) -> bool:
        """As `Scheduling.together`."""
        return self._most_running > 1

    def submit(self, request: Request, sink: Sink) -> Sequence:
        """As `Scheduling.submit`."""
        self._check(request)
        sampler = Sampler(self._model, request)
        sequence = Sequence(request, sink, sampler, self._wake)
        with self._changed:
            if self.failed is not None:
                raise ClosingError(f"the server has failed: {self.failed}")
            if self._closing:
                raise ClosingError(_SHUT_DOWN)
            if len(self._waiting) >= self._most_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting: try again later")
            self._observer.queued(request)
            self._waiting.append(sequence)
            self._changed.notify_all()
        return sequence

    def load(self) -> Load:
        """As `Scheduling.load`."""
        return Load(
            running=len(self._delivery.sequences),
            waiting=len(self._waiting),
            kv_bytes=self._used(),
            kv_limit=self._memory.limit,
            prefix_bytes=self._prefixes.nbytes,
            prefix_limit=self._prefixes.limit,
        )

    def close(self, seconds: float) -> None:
        """As `Scheduling.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        while self._thread.is_alive():
            # Again and again: one may be on its way between those that wait and those that run.
            with self._changed:
                left = [*self._waiting, *self._delivery.sequences]
            for sequence in left:
                sequence.cancel()
            self._thread.join(_POLL_SECONDS)

    def _check(self, request: Request) -> None:
        """Refuse a prompt that can never be answered. Raises: PromptError."""
        prompt = request.prompt
        if not prompt:
            raise PromptError("the prompt has no tokens")
        if self.context is not None and len(prompt) >= self.context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, and prompt and answer together may have "
                f"{self.context}"
            )
        table = self._model.get_input_embeddings()
        if not 0 <= min(prompt) <= max(prompt) < table.num_embeddings:
            raise PromptError(
                f"the prompt has tokens that are not from 0 to {table.num_embeddings - 1}"
            )

    def _run(self, threads: int) -> None:
        """The thread."""
        torch.set_num_threads(threads)  # a new thread begins with torch's default
        try:
            while self._has_work():
                self._delivery.end_cancelled()
                self._admit()
                self._answers.compute()
                self._make_room()
        except BaseException as error:
            log.exception("the scheduler has failed")
            self._fail(error)

    def _has_work(self) -> bool:
        """Wait for something to do; False when the server is closed and all is done."""
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._delivery.sequences):
                    self._changed.wait()
            self._clear_queue()
            with self._changed:
                if self._waiting or self._delivery.sequences:
                    return True
                if self._closing:
                    return False

    def _clear_queue(self) -> None:
        """End those that wait in vain: nobody wants them, or they will not begin any more."""
        with self._changed:
            left = [
                sequence
                for sequence in self._waiting
                if sequence.is_cancelled or (self._closing and not sequence.was_started)
            ]
            for sequence in left:
                self._waiting.remove(sequence)
        for sequence in left:
            if sequence.is_cancelled:
                finish(sequence, Reason.CANCELLED, None, self._observer)
            else:
                finish(sequence, Reason.FAILED, ClosingError(_SHUT_DOWN), self._observer)

    def _admit(self) -> None:
        """Let those begin whose turn it is and for whom there is room."""
        while len(self._delivery.sequences) < self._most_running:
            with self._changed:
                ready = (each for each in self._waiting if not self._delivery.is_underway(each))
                sequence = next(ready, None)
                if sequence is None or not self._has_room(sequence):
                    return
                self._waiting.remove(sequence)
            self._answers.begin(sequence)

    def _make_room(self) -> None:
        """Send the answers that began last back, until the others have room."""
        running = self._delivery.sequences
        while len(running) > 1 and self._used() > self._memory.limit:
            log.info("%s: waits for KV memory", running[-1].request.id)
            self._delivery.send_back(running[-1])

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a sequence fits beside those that run; alone, every one does."""
        needed = self._memory.of(len(sequence.ids))
        return not self._delivery.sequences or self._used() + needed <= self._memory.limit

    def _used(self) -> int:
        """Bytes of the running answers' caches."""
        return sum(self._memory.of(len(each.ids)) for each in list(self._delivery.sequences))

    def _requeue(self, sequence: Sequence) -> None:
        with self._changed:
            self._waiting.appendleft(sequence)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """End everything: no answer can be computed any more."""
        with self._changed:
            self.failed = error
            left = [*self._waiting, *self._delivery.sequences]
            self._waiting.clear()
            self._delivery.sequences.clear()
        for sequence in left:
            told = ClosingError(f"the server has failed: {type(error).__name__}: {error}")
            finish(sequence, Reason.FAILED, told, self._observer)
