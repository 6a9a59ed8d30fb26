"""One answer: streamed, counted, timed, and stopped by Ctrl-C between two tokens."""

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
    """The interface of transformers' streamers, which `generate` calls."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass
class Timing:
    """Token counts of one answer, and wall-clock times in seconds."""

    prompt_tokens: int = 0
    tokens: int = 0
    """Generated tokens, including the end-of-text token."""
    start_s: float = 0.0
    first_s: float | None = None
    """When the first generated token arrived."""
    last_s: float = 0.0
    ids: list[int] = field(default_factory=list, repr=False)

    @property
    def prompt_seconds(self) -> float:
        end_s = self.last_s if self.first_s is None else self.first_s
        return end_s - self.start_s

    @property
    def eval_seconds(self) -> float:
        if self.first_s is None:
            return 0.0
        return self.last_s - self.first_s

    def lines(self) -> list[str]:
        """The lines that `ktransformers.local_chat` prints after an answer."""
        prompt_rate = _rate(self.prompt_tokens, self.prompt_seconds)
        # The prompt's pass yields the first token: the eval duration covers one token fewer than
        # the count.
        rate = _rate(self.tokens - 1, self.eval_seconds)
        return [
            f"prompt eval count:    {self.prompt_tokens} token(s)",
            f"prompt eval duration: {self.prompt_seconds:.3f}s",
            f"prompt eval rate:     {prompt_rate:.2f} tokens/s",
            f"eval count:           {self.tokens} token(s)",
            f"eval duration:        {self.eval_seconds:.3f}s",
            f"eval rate:            {rate:.2f} tokens/s",
        ]


class TimedStreamer:
    """Passes tokens on to a text streamer, counts them and records when they came.

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
        """Begin an answer: the prompt's pass is timed from this call on."""
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
        self._prompt_seen = True
        self._open = True
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        self._open = False
        if self._inner is not None:
            self._inner.end()

    def close(self) -> None:
        """End an interrupted answer; the text streamer would take the next prompt for its text."""
        if self._open:
            self.end()


class Stop:
    """A stopping criterion that Ctrl-C sets: an answer ends between two tokens.

    While the prompt is computed there is no next token to wait for, only a pass that may take
    minutes. Then Ctrl-C raises `KeyboardInterrupt` at once, as a second Ctrl-C always does.

    Args:
        begun: whether the answer has begun.
    """

    def __init__(self, begun: Callable[[], bool] = lambda: True) -> None:
        self.requested = False
        self._begun = begun

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        """[B] bool on the device of `input_ids` [B, T]."""
        batch = input_ids.shape[0]
        return torch.full((batch,), self.requested, device=input_ids.device, dtype=torch.bool)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle Ctrl-C while the block runs; then restore the previous handler."""
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
    if count <= 0 or seconds <= 0:
        return 0.0
    return count / seconds
