"""What the server's parts say to each other about one answer.

    handlers   Request -->  scheduler   submit, cancel
    handlers  <--  Sink     scheduler   started, token, token, ..., end

Handlers speak HTTP and text; the scheduler knows tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from hybrimoe_plugin.errors import HybriMoEError


class QueueFullError(HybriMoEError):
    """As many requests wait as may wait: try again later."""


class PromptError(HybriMoEError):
    """A prompt that can never be answered: empty, too long, or with tokens that do not exist."""


class ClosingError(HybriMoEError):
    """The server is being shut down, or has failed, and takes no more requests."""


class LateError(HybriMoEError):
    """An answer took longer than it may take."""


@dataclass(frozen=True)
class Sampling:
    """How each token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: 0 for all tokens.
        repetition_penalty: of transformers: over prompt and answer.
        presence_penalty, frequency_penalty: OpenAI's: subtracted from the logits of tokens that
            the answer holds already, once or for each time.
        logit_bias: token id -> what is added to its logit.
        min_tokens: no end of the text before so many tokens.
        ignore_eos: whether the end of the text is a token like any other.
        stop_token_ids: tokens that end the answer, besides the model's.
        seed: of this answer's own random numbers; None for any.
        logprobs: how many of the likeliest tokens are told with each token; None tells not even
            its own log-probability. Of the distribution before temperature and filters.
        grammar: what `serve.sampling.grammar` has compiled; None leaves the text free.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    grammar: Any = None


@dataclass(frozen=True)
class Request:
    """One answer that is asked for.

    Attributes:
        id: for logs and metrics.
        prompt: token ids, at least one.
        max_tokens: most tokens of the answer; None for as many as the context has room for.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


class Token(NamedTuple):
    """One token of an answer.

    Attributes:
        logprob: natural logarithm; None where it was not asked for.
        top: the likeliest tokens and their log-probabilities, best first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Reason(str, Enum):
    """Why an answer ended."""

    STOP = "stop"
    """By a token that ends the text, or because the sink wanted no more."""
    LENGTH = "length"
    """By `max_tokens`, or because the context is full."""
    CANCELLED = "cancelled"
    FAILED = "failed"


class End(NamedTuple):
    """How an answer ended.

    Attributes:
        tokens: how many the sink was given.
        error: what failed, where the reason is `FAILED`.
    """

    reason: Reason
    tokens: int
    error: BaseException | None = None


class Sink(Protocol):
    """Takes one answer. Called by the scheduler's thread: it must not wait or block."""

    def started(self, cached_tokens: int) -> None:
        """The request left the queue; so many tokens of its prompt need no computation."""

    def put(self, token: Token) -> bool:
        """Take a token that is part of the answer; whether the answer goes on.

        A token that ends the text is not handed over, unless `ignore_eos` asks for it.
        """

    def end(self, end: End) -> None:
        """Called once, after everything else, whatever happened."""


class Ticket(Protocol):
    """A request that was submitted."""

    def cancel(self) -> None:
        """Give its place up, at the latest after the running step. Any thread; any number of times.

        The sink is told by `end`, unless the answer has ended already.
        """


class Load(NamedTuple):
    """What a scheduler has to do at the moment.

    Attributes:
        running: answers that are being computed.
        waiting: requests in the queue.
        kv_bytes: memory that the running answers' KV caches take.
        kv_limit: most that they may take.
        prefix_bytes: memory of kept prefixes.
        prefix_limit: most that they may take.
    """

    running: int
    waiting: int
    kv_bytes: int
    kv_limit: int
    prefix_bytes: int
    prefix_limit: int


class Scheduling(Protocol):
    """What handlers need of a scheduler."""

    @property
    def together(self) -> bool:
        """Whether several answers are computed at once; otherwise they queue."""

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer; None without a limit."""

    @property
    def failed(self) -> BaseException | None:
        """What ended the scheduler's thread, if anything did: no answer will ever come."""

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Queue a request.

        Raises:
            QueueFullError, PromptError, ClosingError: it is not queued, and the sink stays unused.
        """

    def load(self) -> Load:
        """How much there is to do now."""

    def close(self, seconds: float) -> None:
        """Take no more requests, finish those that run within the time, end the others.

        Those that wait are ended at once, by `ClosingError`. Called twice, the second waits too.
        """


class Observer:
    """Is told what happens to requests, by the scheduler's thread; this one does nothing.

    Seconds are wall-clock time.
    """

    def queued(self, request: Request) -> None: ...

    def started(self, request: Request, waited_s: float, cached_tokens: int) -> None:
        """A request left the queue."""

    def first_token(self, request: Request, since_queued_s: float) -> None: ...

    def next_token(self, request: Request, since_last_s: float) -> None: ...

    def ended(self, request: Request, end: End, since_queued_s: float) -> None: ...

    def step(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """One pass through the model: so many answers' next tokens, and pieces of prompts."""
