"""The items of an answer, and the events that tell of them while it is computed."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.serve.api.conversations.exchange import Event

_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class Output:
    """Takes an answer in pieces, in order.

    Attributes:
        items: those that are complete.
    """

    def __init__(self, answer_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._id = answer_id
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def text(self, piece: str, logprobs: list[dict[str, Any]] | None = None) -> list[Event]:
        """The events of some more text."""
        events = self._part_of("message", {"role": "assistant"})
        self._pieces.append(piece)
        self._logprobs += logprobs or []
        about = {"content_index": 0, "delta": piece, "logprobs": logprobs or []}
        return [*events, self._event("response.output_text.delta", **about)]

    def reasoning(self, piece: str) -> list[Event]:
        """The events of some more reasoning."""
        events = self._part_of("reasoning", {"summary": []})
        self._pieces.append(piece)
        delta = self._event("response.reasoning_text.delta", content_index=0, delta=piece)
        return [*events, delta]

    def call(self, call_id: str, name: str) -> list[Event]:
        """The events of the beginning of a function's call."""
        about = {"call_id": call_id, "name": name, "arguments": ""}
        return [*self.close(), self._start("function_call", about)]

    def arguments(self, piece: str) -> list[Event]:
        """The events of some more arguments of the call that has begun, as JSON."""
        self._pieces.append(piece)
        return [self._event("response.function_call_arguments.delta", delta=piece)]

    def close(self, status: str = "completed") -> list[Event]:
        """The events of the end of the item that is open, if one is."""
        if self._open is None:
            return []
        whole = "".join(self._pieces)
        kind = self._open["type"]
        if kind == "function_call":
            item = {**self._open, "arguments": whole, "status": status}
            about = {"name": item["name"], "arguments": whole}
            events = [self._event("response.function_call_arguments.done", **about)]
        else:
            part = self._part(whole, self._logprobs)
            item = {**self._open, "content": [part], "status": status}
            is_text = kind == "message"
            name = "response.output_text.done" if is_text else "response.reasoning_text.done"
            told = {"logprobs": self._logprobs} if is_text else {}
            events = [
                self._event(name, content_index=0, text=whole, **told),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        events.append(self._item_event("done", item))
        self.items.append(item)
        self._open = None
        return events

    def _part_of(self, kind: str, about: dict[str, Any]) -> list[Event]:
        """The events of the beginning of an item of one part, unless it is open."""
        if self._open is not None and self._open["type"] == kind:
            return []
        events = [*self.close(), self._start(kind, {**about, "content": []})]
        part = self._part("", [])
        return [*events, self._event("response.content_part.added", content_index=0, part=part)]

    def _start(self, kind: str, about: dict[str, Any]) -> Event:
        item_id = f"{_PREFIX[kind]}_{self._id}_{len(self.items)}"
        self._open = {"id": item_id, "type": kind, "status": "in_progress", **about}
        self._pieces, self._logprobs = [], []
        return self._item_event("added", self._open)

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._open is not None and self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item_event(self, what: str, item: dict[str, Any]) -> Event:
        kind = f"response.output_item.{what}"
        return {"type": kind, "output_index": len(self.items), "item": item}

    def _event(self, kind: str, **about: Any) -> Event:
        """An event inside the item that is open."""
        assert self._open is not None
        where = {"item_id": self._open["id"], "output_index": len(self.items)}
        return {"type": kind, **where, **about}
