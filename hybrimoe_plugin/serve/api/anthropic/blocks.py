"""The content blocks of an answer, and the events that tell of them while it is computed."""

from __future__ import annotations

import json
from typing import Any

Event = dict[str, Any]
"""A server-sent event; `type` is its name too."""

UNSIGNED = "unsigned"
"""The signature of every thinking block. Clients that find none leave the block out when they
send the conversation again; this server checks none."""


class Blocks:
    """Takes an answer in pieces, in order.

    Attributes:
        content: the blocks that are complete.
    """

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._kind: str | None = None
        self._pieces: list[str] = []

    def text(self, piece: str) -> list[Event]:
        """The events of some more text."""
        return self._more("text", {}, piece)

    def thinking(self, piece: str, shown: bool = True) -> list[Event]:
        """The events of some more thinking; where it is not shown, of an empty block."""
        return self._more("thinking", {"signature": ""}, piece if shown else "")

    def tool_use(self, call_id: str, name: str, arguments: dict[str, Any]) -> list[Event]:
        """The events of one complete call of a tool."""
        block = {"type": "tool_use", "id": call_id, "name": name}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
        events = [*self.close(), self._start({**block, "input": {}}), self._delta(delta)]
        events.append(self._stop({**block, "input": arguments}))
        return events

    def close(self) -> list[Event]:
        """The events of the end of the block that is open, if one is."""
        if self._kind is None:
            return []
        kind, self._kind = self._kind, None
        block = {"type": kind, kind: "".join(self._pieces)}
        events = []
        if kind == "thinking":
            block["signature"] = UNSIGNED
            events.append(self._delta({"type": "signature_delta", "signature": UNSIGNED}))
        events.append(self._stop(block))
        return events

    def _more(self, kind: str, beside: dict[str, str], piece: str) -> list[Event]:
        events = []
        if self._kind != kind:
            events += self.close()
            self._kind, self._pieces = kind, []
            events.append(self._start({"type": kind, kind: "", **beside}))
        if piece:
            self._pieces.append(piece)
            events.append(self._delta({"type": f"{kind}_delta", kind: piece}))
        return events

    def _start(self, block: dict[str, Any]) -> Event:
        return {
            "type": "content_block_start",
            "index": len(self.content),
            "content_block": block,
        }

    def _delta(self, delta: dict[str, str]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content), "delta": delta}

    def _stop(self, block: dict[str, Any]) -> Event:
        self.content.append(block)
        return {"type": "content_block_stop", "index": len(self.content) - 1}
