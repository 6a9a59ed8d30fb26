"""One answer: streamed, counted, timed, and stopped by Ctrl-C at a token's end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class TokenStreamer(Protocol):
    """What `generate` calls: transformers' streamers."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass
class Timing:
    """Token counts and times of one answer; times by the wall clock, in seconds."""

    prompt_tokens: int = 0
    tokens: int = 0
    """Generated ones, the end-of-text token included."""
    start_s: float = 0.0
    first_s: float | None = None
    """When the first generated token arrived."""
    last_s: float = 0.0
    ids: list[int] = field(default_factory=list, repr=False)

    @property
    def prompt_seconds(self) -> float:
        return (self.last_s if self.first_s is None else self.first_s) - self.start_s

    @property
    def eval_seconds(self) -> float:
        return 0.0 if self.first_s is None else self.last_s - self.first_s

    def lines(self) -> list[str]:
        """The lines that `ktransformers.local_chat` prints after an answer."""
        # The first token comes out of the prompt's pass: the eval duration holds one token fewer
        # than the count.
        return [
            f"prompt eval count:    {self.prompt_tokens} token(s)",
            f"prompt eval duration: {self.prompt_seconds:.3f}s",
            f"prompt eval rate:     {_rate(self.prompt_tokens, self.prompt_seconds):.2f} tokens/s",
            f"eval count:           {self.tokens} token(s)",
            f"eval duration:        {self.eval_seconds:.3f}s",
            f"eval rate:            {_rate(self.tokens - 1, self.eval_seconds):.2f} tokens/s",
        ]


class TimedStreamer:
    """Hands tokens on to a text streamer, counts them and notes when they came.

    Args:
        inner: prints the text; `None` prints nothing.
        clock: seconds.
    """

    def __init__(
        self, inner: TokenStreamer | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._inner = inner
        self._clock = clock
        self._prompt_seen = False
        self._open = False
        self.timing = Timing()

    def start(self, prompt_tokens: int) -> None:
        """Begin an answer; the prompt's pass is timed from here."""
        now = self._clock()
        self._prompt_seen = False
        self.timing = Timing(prompt_tokens=prompt_tokens, start_s=now, last_s=now)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or new tokens, [n] or [1, n] int64 on the CPU."""
        if self._prompt_seen:
            self.timing.last_s = self._clock()
            if self.timing.first_s is None:
                self.timing.first_s = self.timing.last_s
            self.timing.tokens += value.numel()
            self.timing.ids += value.flatten().tolist()
        self._prompt_seen = self._open = True
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        self._open = False
        if self._inner is not None:
            self._inner.end()

    def close(self) -> None:
        """End an answer that was broken off, or the text streamer would take the next prompt for a
        part of it.
        """
        if self._open:
            self.end()


class Stop:
    """A stopping criterion that Ctrl-C sets, so that an answer ends between two tokens and nothing
    is torn.

    While the prompt is computed there is no next token to wait for, only a pass that may take
    minutes: then the first Ctrl-C raises `KeyboardInterrupt` at once, as a second one always does.

    Args:
        begun: whether the answer has begun.
    """

    def __init__(self, begun: Callable[[], bool] = lambda: True) -> None:
        self.requested = False
        self._begun = begun

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        """[B] bool on the device of `input_ids` [B, T]."""
        return torch.full(
            (input_ids.shape[0],), self.requested, device=input_ids.device, dtype=torch.bool
        )

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Take Ctrl-C while the block runs; the handler from before is put back."""
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, _number: int, _frame: object) -> None:
        if self.requested or not self._begun():
            raise KeyboardInterrupt
        self.requested = True


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
