"""From the scheduler's thread to a handler: what one or several answers bring."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from typing import Any

from hybrimoe_plugin.hosts.transformers.chat.text import AnswerText
from hybrimoe_plugin.serve.requests import End, Token


@dataclass(frozen=True)
class Started:
    """An answer left the queue.

    Attributes:
        cached_tokens: of the prompt, which need no computation.
    """

    cached_tokens: int


@dataclass(frozen=True)
class Piece:
    """A token and the text that it made certain, which may be none.

    Attributes:
        token: None where only text that was held back comes, at the end.
        stop: the stop string that has ended the text; "" where none has.
    """

    text: str
    token: Token | None
    stop: str = ""


Item = Started | Piece | End


class Channel:
    """Hands over without waiting; a reader who is late gets all that has piled up at once.

    Made on the event loop that reads. It holds no more than the answers' tokens.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._items: list[tuple[int, Item]] = []
        self._filled = asyncio.Event()

    def push(self, index: int, item: Item) -> None:
        """Hand over what an answer brought. Any thread."""
        with self._lock:
            self._items.append((index, item))
            is_first = len(self._items) == 1
        if is_first:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._filled.set)

    async def take(self) -> list[tuple[int, Item]]:
        """Everything that has come, in its order; waits for the first. On the event loop."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            items = self.ready()
            if items:
                return items

    def ready(self) -> list[tuple[int, Item]]:
        """What has come, without waiting."""
        with self._lock:
            items, self._items = self._items, []
        return items


class AnswerSink:
    """A sink that decodes tokens, looks for stop strings, and hands both over.

    Args:
        index: of the answer, among those of the channel.
        hidden: tokens that have no text, whatever the tokenizer says.
        stops, keep_stop, skip_special_tokens: as of `AnswerText`.
    """

    def __init__(
        self,
        index: int,
        channel: Channel,
        tokenizer: Any,
        stops: tuple[str, ...] = (),
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._index = index
        self._channel = channel
        self._hidden = hidden
        self._new: list[str] = []
        """Text that became certain since the last piece."""
        self._text = AnswerText(tokenizer, self._new.append, stops, keep_stop, skip_special_tokens)

    def started(self, cached_tokens: int) -> None:
        self._channel.push(self._index, Started(cached_tokens))

    def put(self, token: Token) -> bool:
        if token.id not in self._hidden:
            self._text.put([token.id])
        self._push(token)
        return not self._text.stopped

    def end(self, end: End) -> None:
        try:
            self._text.end()
            if self._new:
                self._push(None)
        finally:  # whatever a tokenizer does, the reader must learn that nothing more comes
            self._channel.push(self._index, end)

    def _push(self, token: Token | None) -> None:
        text = "".join(self._new)
        self._new.clear()
        self._channel.push(self._index, Piece(text, token, self._text.stop))
