"""The text of an answer as its tokens come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_INCOMPLETE = "\ufffd"
"""What a decoder gives for a character of which bytes are missing."""
_MOST_WAITING = 8
"""Tokens without text of their own that are decoded again with each new one. A character has four
bytes at most; without a bound, an answer of broken characters alone would take quadratic time.
"""


class AnswerText:
    """Decodes tokens one by one, and holds back what may become a stop string.

        stop "END"    tokens   | It | is | E | N | TER | . E | ND | It |
                      written  | It | is |   |   | ENTER | . |    the answer has ended

    Args:
        tokenizer: of the model.
        write: takes each part of the text, once it is certain.
        stops: strings that end the answer; it ends before them.
        keep_stop: whether it ends behind them instead.
        skip_special_tokens: whether tokens that control the model are left out.

    Attributes:
        opening: written before the first token; no stop string is looked for in it.
        text: what was written so far.
        stopped: whether a stop string was found. What comes after it is ignored.
        stop: the one that was found; "" where none was.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], object],
        stops: Sequence[str] = (),
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.opening = ""
        self.text = ""
        self.stop = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._write = write
        self._stops = tuple(stops)
        self._keep_stop = keep_stop
        self._skip_special_tokens = skip_special_tokens
        self._held = ""
        """Decoded and not yet written: it may be the beginning of a stop string."""
        self._ids: list[int] = []
        """The last tokens that gave text, and those behind them that have given none."""
        self._given = 0
        """How many of them gave text."""

    def put(self, ids: Sequence[int]) -> None:
        """Take new tokens."""
        opening, self.opening = self.opening, ""
        self._emit(opening)
        self._ids += ids
        self._take(self._decoded(whole_characters=True))
        if len(self._ids) - self._given > _MOST_WAITING:
            self._take(self._decoded(whole_characters=False))
            del self._ids[self._given :]  # those that still have no text never will

    def end(self) -> None:
        """Write what was held back."""
        self._take(self._decoded(whole_characters=False))
        held, self._held = self._held, ""
        if not self.stopped:
            self._emit(held)

    def _decoded(self, whole_characters: bool) -> str:
        """The text of the tokens that have given none.

        Decoded behind those before them: a token's text may depend on its neighbour, as spaces do.
        """
        before = self._decode(self._ids[: self._given])
        text = self._decode(self._ids)
        if len(text) <= len(before) or (whole_characters and text.endswith(_INCOMPLETE)):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special_tokens))

    def _take(self, text: str) -> None:
        if self.stopped or not text:
            return
        held = self._held + text
        # The first to begin; of several there, the longest.
        found = [(place, -len(stop)) for stop in self._stops if (place := held.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            place, length = min(found)
            self.stop = held[place : place - length]
            certain = place - length if self._keep_stop else place
        else:
            certain = len(held) - self._beginning(held)
        self._held = held[certain:]
        self._emit(held[:certain])

    def _beginning(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0

    def _emit(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)
