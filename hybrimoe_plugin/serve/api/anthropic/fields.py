"""The body of Anthropic's Messages, and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hybrimoe_plugin.serve.api.anthropic.conversation import messages_of, tools_of
from hybrimoe_plugin.serve.api.checks import (
    Check,
    boolean,
    list_of,
    mapping,
    one_of,
    refused,
    text,
    wrong,
)
from hybrimoe_plugin.serve.api.conversations.asked import Asked, structure_in
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.api.openai_completions import messages as chat
from hybrimoe_plugin.serve.api.openai_completions.fields import COMMON, options_of
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.tools import Tools

_FIELDS: Mapping[str, Check] = {
    "tools": list_of(mapping),
    "tool_choice": mapping,
    "thinking": mapping,
    "output_config": mapping,
    "chat_template_kwargs": mapping,
    "n": refused((1,)),
    "stop": refused(advice="use stop_sequences"),
    "output_format": refused(advice="use output_config.format"),
    "container": refused(),
    "mcp_servers": refused(([],)),
}
"""This endpoint's own fields; the others are in `COMMON`. What is in neither is ignored:
`cache_control` too, since prefixes are kept anyhow."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True)
class Body:
    """What a body asks for.

    Attributes:
        shows_thinking: whether the client wants to see what the model thinks.
    """

    asked: Asked
    stream: bool
    shows_thinking: bool


def read(body: dict[str, Any], service: Service) -> Body:
    """A body of Messages, checked.

    Raises:
        ApiError: a field is missing, wrong, or not supported.
    """
    if body.get("max_tokens") is None:
        raise wrong("max_tokens", "given")
    options = options_of(body, _FIELDS, service, None, None)
    given = options.given
    output = given.get("output_config", {})
    variables, shows_thinking = _thinking(given)
    if output.get("effort") is not None:
        variables["reasoning_effort"] = text("output_config.effort", output["effort"])
    structure = None
    if output.get("format") is not None:
        where = "output_config.format"
        structure = structure_in(where, mapping(where, output["format"]))
    messages = messages_of(body)
    continues = messages[-1]["role"] == "assistant"
    if continues and "tool_calls" in messages[-1]:
        raise ApiError(400, "messages end with a tool's call: its result must follow", "messages")
    asked = Asked(
        "messages",
        messages,
        _tools(body, given.get("tool_choice")),
        {**variables, **given.get("chat_template_kwargs", {})},
        replace(options.wanted, stops=_stops(body, service)),
        continues,
        structure,
    )
    return Body(asked, options.stream, shows_thinking)


def _stops(body: dict[str, Any], service: Service) -> tuple[str, ...]:
    name = "stop_sequences"
    if body.get(name) is None:
        return ()
    stops = list_of(text, most=service.limits.stops)(name, body[name])
    found: tuple[str, ...] = COMMON["stop"](name, stops)
    return found


def _thinking(given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The template's variables, and whether thinking is shown.

    A budget is not kept to: templates know none. `max_tokens` counts thinking too.
    """
    thinking = given.get("thinking")
    if thinking is None:
        return {}, True
    kind = one_of("enabled", "adaptive", "disabled")("thinking.type", thinking.get("type"))
    display = thinking.get("display")
    if display is not None:
        one_of("summarized", "omitted")("thinking.display", display)
    return {"enable_thinking": kind != "disabled"}, display != "omitted"


def _tools(body: dict[str, Any], choice: dict[str, Any] | None) -> Tools:
    told: dict[str, Any] = {"tools": tools_of(body) or []}
    if choice is not None:
        kind = one_of(*_CHOICES, "tool")("tool_choice.type", choice.get("type"))
        name = "tool_choice.disable_parallel_tool_use"
        told["parallel_tool_calls"] = not boolean(
            name, choice.get("disable_parallel_tool_use") or False
        )
        told["tool_choice"] = _CHOICES.get(kind) or {
            "function": {"name": text("tool_choice.name", choice.get("name"))}
        }
    return chat.tools_of(told)
