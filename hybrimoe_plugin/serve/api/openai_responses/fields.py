"""The body of OpenAI's Responses, and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrimoe_plugin.serve.api.checks import (
    Check,
    boolean,
    checked,
    list_of,
    mapping,
    one_of,
    refused,
    text,
    whole,
)
from hybrimoe_plugin.serve.api.conversations.asked import Asked, structure_in
from hybrimoe_plugin.serve.api.conversations.turns import unsupported
from hybrimoe_plugin.serve.api.openai_completions import messages as chat
from hybrimoe_plugin.serve.api.openai_completions.fields import options_of
from hybrimoe_plugin.serve.api.openai_completions.structure import Structure
from hybrimoe_plugin.serve.api.openai_responses.items import messages_of, tools_of
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.tools import Tools

_NOTHING_STORED = "nothing is stored here: send the whole conversation as input"
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_LOGPROBS = "message.output_text.logprobs"


_FIELDS: Mapping[str, Check] = {
    "max_output_tokens": whole(1),
    "include": list_of(text),
    "top_logprobs": whole(0),
    "tool_choice": chat.tool_choice,
    "parallel_tool_calls": boolean,
    "text": mapping,
    "reasoning": mapping,
    "metadata": mapping,
    "user": text,
    "chat_template_kwargs": mapping,
    "n": refused((1,)),
    "previous_response_id": refused(advice=_NOTHING_STORED),
    "conversation": refused(advice=_NOTHING_STORED),
    "prompt": refused(advice=_NOTHING_STORED),
    "background": refused((False,), _NOTHING_STORED),
    "truncation": refused(("disabled",)),
    "context_management": refused(([],)),
    "moderation": refused(),
}
"""This endpoint's own fields; the others are in `COMMON`. What is in neither is ignored: `store`
too, of which the answer says that it was not followed."""


@dataclass(frozen=True)
class Body:
    """What a body asks for."""

    asked: Asked
    stream: bool


def read(body: dict[str, Any], service: Service) -> Body:
    """A body of Responses, checked.

    Raises:
        ApiError: a field is missing, wrong, or not supported.
    """
    own = checked(body, _FIELDS)
    # The older name means nothing here.
    told = {name: value for name, value in body.items() if name != "max_tokens"}
    most = own.get("max_output_tokens")
    options = options_of(told, _FIELDS, service, _logprobs(own), most)
    asked = Asked(
        "input",
        messages_of(body),
        _tools(body, own),
        {**_variables(own), **own.get("chat_template_kwargs", {})},
        options.wanted,
        structure=_structure(own.get("text", {})),
    )
    return Body(asked, options.stream)


def _structure(told: Mapping[str, Any]) -> Structure | None:
    if told.get("verbosity") is not None:
        refused(("medium",))("text.verbosity", told["verbosity"])
    if told.get("format") is None:
        return None
    return structure_in("text.format", mapping("text.format", told["format"]))


def _logprobs(own: Mapping[str, Any]) -> int | None:
    most: int | None = own.get("top_logprobs") or None
    return most or 0 if _LOGPROBS in own.get("include", []) else most


def _variables(own: Mapping[str, Any]) -> dict[str, Any]:
    effort = own.get("reasoning", {}).get("effort")
    if effort is None:
        return {}
    one_of(*_EFFORTS)("reasoning.effort", effort)
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}


def _tools(body: dict[str, Any], own: Mapping[str, Any]) -> Tools:
    told: dict[str, Any] = {"tools": tools_of(body) or []}
    if "parallel_tool_calls" in own:
        told["parallel_tool_calls"] = own["parallel_tool_calls"]
    choice = own.get("tool_choice")
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise unsupported("tool_choice.type", choice.get("type"))
        choice = {"function": {"name": text("tool_choice.name", choice.get("name"))}}
    if choice is not None:
        told["tool_choice"] = choice
    return chat.tools_of(told)
