"""The content blocks of an answer, and the events that tell of them while it is computed."""

from __future__ import annotations

import json
from typing import Any

from hybrimoe_plugin.serve.api.conversations.exchange import Event

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
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []

    def text(self, piece: str) -> list[Event]:
        """The events of some more text."""
        return self._more({"type": "text", "text": ""}, "text", piece)

    def thinking(self, piece: str, shown: bool = True) -> list[Event]:
        """The events of some more thinking; where it is not shown, of an empty block."""
        block = {"type": "thinking", "thinking": "", "signature": ""}
        return self._more(block, "thinking", piece if shown else "")

    def tool_use(self, call_id: str, name: str) -> list[Event]:
        """The events of the beginning of a tool's call."""
        block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        return [*self.close(), self._start(block)]

    def arguments(self, piece: str) -> list[Event]:
        """The events of some more arguments of the call that has begun, as JSON."""
        return [self._piece("input_json_delta", "partial_json", piece)] if piece else []

    def close(self) -> list[Event]:
        """The events of the end of the block that is open, if one is."""
        if self._open is None:
            return []
        block, self._open = self._open, None
        whole = "".join(self._pieces)
        events = []
        if block["type"] == "tool_use":
            block = {**block, "input": _object(whole)}
        elif block["type"] == "thinking":
            block = {**block, "thinking": whole, "signature": UNSIGNED}
            events.append(self._delta({"type": "signature_delta", "signature": UNSIGNED}))
        else:
            block = {**block, "text": whole}
        self.content.append(block)
        return [*events, {"type": "content_block_stop", "index": len(self.content) - 1}]

    def _more(self, block: dict[str, Any], key: str, piece: str) -> list[Event]:
        events = []
        if self._open is None or self._open["type"] != block["type"]:
            events += [*self.close(), self._start(block)]
        if piece:
            events.append(self._piece(f"{key}_delta", key, piece))
        return events

    def _start(self, block: dict[str, Any]) -> Event:
        self._open, self._pieces = block, []
        index = len(self.content)
        return {"type": "content_block_start", "index": index, "content_block": block}

    def _piece(self, kind: str, key: str, piece: str) -> Event:
        self._pieces.append(piece)
        return self._delta({"type": kind, key: piece})

    def _delta(self, delta: dict[str, str]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content), "delta": delta}


def _object(text: str) -> dict[str, Any]:
    """Arguments, which were cut off where they are no JSON object: then there are none."""
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
