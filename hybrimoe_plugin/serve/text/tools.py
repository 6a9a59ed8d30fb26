"""The functions that a model may or must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tools:
    """What may be called in an answer.

    Attributes:
        functions: as OpenAI writes them: `{"type": "function", "function": {...}}`.
        choice: `auto`, `none`, `required`, or the name of the one that must be called.
        parallel: whether an answer may hold several calls.
    """

    functions: Sequence[Mapping[str, Any]] = ()
    choice: str = "auto"
    parallel: bool = True
    named: bool = False
    """Whether `choice` is a name. A function may be called `auto`."""

    @property
    def may_be_called(self) -> bool:
        return bool(self.functions) and (self.named or self.choice != "none")

    @property
    def must_be_called(self) -> bool:
        return bool(self.functions) and (self.named or self.choice == "required")

    def schema(self) -> dict[str, Any]:
        """What the answer must be, as JSON schema, where a call is required.

        The arguments of the function that is named; else a list of calls with `name` and
        `arguments`.
        """
        if self.named:
            return next(
                _parameters(one["function"])
                for one in self.functions
                if one["function"]["name"] == self.choice
            )
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": one["function"]["name"]},
                    "arguments": _parameters(one["function"]),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for one in self.functions
        ]
        found: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
        if not self.parallel:
            found["maxItems"] = 1
        return found


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return dict(function.get("parameters") or {"type": "object", "additionalProperties": False})
