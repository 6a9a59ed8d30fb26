"""The items of an answer, and the events that tell of them while it is computed."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]
"""A server-sent event without its number; `type` is its name too."""


class Output:
    """Takes an answer in pieces, in order.

    Attributes:
        items: those that are complete.
    """

    def __init__(self, answer_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._id = answer_id
        self._kind: str | None = None
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def text(self, piece: str, logprobs: list[dict[str, Any]] | None = None) -> list[Event]:
        """The events of some more text."""
        events = self._open("message")
        self._pieces.append(piece)
        self._logprobs += logprobs or []
        about = {"delta": piece, "logprobs": logprobs or []}
        return [*events, self._at("response.output_text.delta", **about)]

    def reasoning(self, piece: str) -> list[Event]:
        """The events of some more reasoning."""
        events = self._open("reasoning")
        self._pieces.append(piece)
        return [*events, self._at("response.reasoning_text.delta", delta=piece)]

    def call(self, call_id: str, name: str, arguments: str) -> list[Event]:
        """The events of one complete call of a function."""
        events = self.close()
        self._kind = "function_call"
        item = {"id": self._item_id, "type": "function_call", "call_id": call_id, "name": name}
        begun = {**item, "arguments": "", "status": "in_progress"}
        made = {**item, "arguments": arguments, "status": "completed"}
        of = "response.function_call_arguments"
        events += [
            self._at("response.output_item.added", item=begun),
            self._at(f"{of}.delta", delta=arguments),
            self._at(f"{of}.done", arguments=arguments, name=name),
            self._at("response.output_item.done", item=made),
        ]
        self._keep(made)
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """The events of the end of the item that is open, if one is."""
        if self._kind is None:
            return []
        text = "".join(self._pieces)
        part = self._part(text, self._logprobs)
        item = {**self._item([part]), "status": status}
        if self._kind == "message":
            told = {"text": text, "logprobs": self._logprobs}
            events = [self._at("response.output_text.done", **told)]
        else:
            events = [self._at("response.reasoning_text.done", text=text)]
        events += [
            self._at("response.content_part.done", part=part),
            self._at("response.output_item.done", item=item),
        ]
        self._keep(item)
        return events

    def _open(self, kind: str) -> list[Event]:
        if self._kind == kind:
            return []
        events = self.close()
        self._kind, self._pieces, self._logprobs = kind, [], []
        item = {**self._item([]), "status": "in_progress"}
        events += [
            self._at("response.output_item.added", item=item),
            self._at("response.content_part.added", part=self._part("", [])),
        ]
        return events

    def _keep(self, item: dict[str, Any]) -> None:
        self.items.append(item)
        self._kind = None

    @property
    def _item_id(self) -> str:
        of = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[self._kind or "message"]
        return f"{of}_{self._id}_{len(self.items)}"

    def _item(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        item = {"id": self._item_id, "type": self._kind, "content": content}
        return {**item, **({"role": "assistant"} if self._kind == "message" else {"summary": []})}

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _at(self, kind: str, **about: Any) -> Event:
        """An event of the item that is open."""
        event = {"type": kind, "output_index": len(self.items), **about}
        if "item" not in about:
            event["item_id"] = self._item_id
            if not kind.startswith("response.function_call"):
                event["content_index"] = 0
        return event
