"""One answer's tokens: streamed, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybrimoe_plugin.hosts.transformers.chat.text import AnswerText


@dataclass
class Timing:
    """Token counts of one answer, and wall-clock times in seconds.

    start_s           first_s    ...    last_s
       | prompt's pass   |  token  | token |
       |                 t0        t1      t2      two tokens are timed, three were generated
    """

    prompt_tokens: int = 0
    """Computed for this answer."""
    kept_tokens: int = 0
    """Of the prompt, and not computed: they were kept from the conversation."""
    tokens: int = 0
    """Generated tokens, including the end-of-text token."""
    start_s: float = 0.0
    first_s: float | None = None
    """When the first generated token arrived."""
    last_s: float = 0.0

    @property
    def timed_tokens(self) -> int:
        """Generated within `eval_seconds`: the prompt's pass yields the first token."""
        return max(0, self.tokens - 1)

    @property
    def prompt_seconds(self) -> float:
        end_s = self.last_s if self.first_s is None else self.first_s
        return end_s - self.start_s

    @property
    def eval_seconds(self) -> float:
        if self.first_s is None:
            return 0.0
        return self.last_s - self.first_s

    @property
    def context_tokens(self) -> int:
        """Tokens of the conversation, with this answer."""
        return self.kept_tokens + self.prompt_tokens + self.tokens

    def lines(self) -> list[str]:
        """The lines that `ktransformers.local_chat` prints after an answer.

        Each rate is the count divided by the duration, as printed.
        """
        found = [
            f"prompt eval count:    {self.prompt_tokens} token(s)",
            f"prompt eval duration: {self.prompt_seconds:.3f}s",
            f"prompt eval rate:     {_rate(self.prompt_tokens, self.prompt_seconds):.2f} tokens/s",
            f"eval count:           {self.timed_tokens} token(s)",
            f"eval duration:        {self.eval_seconds:.3f}s",
            f"eval rate:            {_rate(self.timed_tokens, self.eval_seconds):.2f} tokens/s",
        ]
        if self.kept_tokens:
            kept = f"{self.kept_tokens} token(s) of the conversation"
            found.insert(0, f"prompt kept:          {kept}")
        return found


class TimedStreamer:
    """A streamer for `generate`: hands tokens to a text, counts them, records when they came.

    Args:
        timing: of the answer, which begins now. Mutates.
        text: takes the tokens; None for none.
        on_first: called when the first token is there.
        clock: seconds.
    """

    def __init__(
        self,
        timing: Timing,
        text: AnswerText | None = None,
        on_first: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._timing = timing
        self._text = text
        self._on_first = on_first
        self._clock = clock
        self._prompt_seen = False
        timing.start_s = timing.last_s = clock()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or new tokens, [n] or [1, n] int64 on the CPU."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        timing = self._timing
        timing.last_s = self._clock()
        if timing.first_s is None:
            timing.first_s = timing.last_s
            self._on_first()
        ids = value.flatten().tolist()
        timing.tokens += len(ids)
        if self._text is not None:
            self._text.put(ids)

    def end(self) -> None:
        """The answer has ended; its text is ended by whoever made it."""


def _rate(count: int, seconds: float) -> float:
    printed = round(seconds, 3)
    if count <= 0 or printed <= 0:
        return 0.0
    return count / printed
