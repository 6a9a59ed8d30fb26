"""`POST /v1/chat/completions`, as OpenAI's and vLLM's."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from hybrimoe_plugin.serve.api.body import read_body
from hybrimoe_plugin.serve.api.checks import (
    Check,
    boolean,
    checked,
    list_of,
    mapping,
    one_of,
    refused,
    whole,
)
from hybrimoe_plugin.serve.api.conversations.asked import (
    check_tools,
    check_variables,
    rendered,
)
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.api.openai_completions.chat_answers import ChatAnswers
from hybrimoe_plugin.serve.api.openai_completions.exchange import Exchange
from hybrimoe_plugin.serve.api.openai_completions.fields import options_of
from hybrimoe_plugin.serve.api.openai_completions.messages import (
    messages_of,
    tool_choice,
    tools_of,
)
from hybrimoe_plugin.serve.api.openai_completions.structure import (
    STRUCTURE,
    Structure,
    structure_of,
    with_structure,
)
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.language import Language
from hybrimoe_plugin.serve.text.prompts import Conversation
from hybrimoe_plugin.serve.text.tools import Tools

FIELDS: Mapping[str, Check] = {
    **STRUCTURE,
    "max_completion_tokens": whole(1),
    "logprobs": boolean,
    "top_logprobs": whole(0),
    "tools": list_of(mapping),
    "tool_choice": tool_choice,
    "parallel_tool_calls": boolean,
    "chat_template_kwargs": mapping,
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh"),
    "chat_template": refused(advice="conversations are written by the model's own template"),
    "functions": refused(([],), "use tools"),
    "function_call": refused(("none",), "use tool_choice"),
    "modalities": refused((["text"],)),
    "audio": refused(),
    "web_search_options": refused(),
    "verbosity": refused(("medium",)),
    "documents": refused(([],)),
    "echo": refused((False,)),
    "best_of": refused((1,)),
}
"""This endpoint's own fields; the others are in `fields.COMMON`."""


def router(service: Service) -> APIRouter:
    Language.of(service)  # takes a moment, which no request should wait for
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, service)
        return await _answer(service, request, body)

    return routes


async def _answer(service: Service, request: Request, body: dict[str, Any]) -> Response:
    language = Language.of(service)
    logprobs = _logprobs(checked(body, FIELDS))
    options = options_of(body, FIELDS, service, logprobs, None)
    given = options.given
    tools = tools_of(given)
    structure = _structure(given, tools, language)
    conversation = _conversation(body, given, tools, structure is not None)
    prompt = await rendered(language, conversation, "messages")
    wanted = await with_structure(options.wanted, structure, service.tokenizer)
    id = f"chatcmpl-{uuid.uuid4().hex}"
    questions = language.questions(id, prompt, wanted, tools, plain=structure is not None)
    spelling = None if logprobs is None else language.spelling
    writer = ChatAnswers(id, service.name, spelling, tools.named)
    return await Exchange(service, request, options, questions, writer).answer()


def _logprobs(given: Mapping[str, Any]) -> int | None:
    is_asked = given.get("logprobs", False)
    if "top_logprobs" in given and not is_asked:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return given.get("top_logprobs", 0) if is_asked else None


def _structure(given: Mapping[str, Any], tools: Tools, language: Language) -> Structure | None:
    """The structure of the answer: one that is asked for, or that of a call that must be made."""
    asked = structure_of(given)
    check_tools(language, tools)
    if asked is not None and tools.may_be_called:
        raise ApiError(
            400, f"{asked[0]} leaves no room for tool calls: give tool_choice none", asked[0]
        )
    if tools.must_be_called:
        return "tool_choice", "json_schema", tools.schema()
    return asked


def _conversation(
    body: Mapping[str, Any], given: Mapping[str, Any], tools: Tools, has_structure: bool
) -> Conversation:
    messages = messages_of(body.get("messages"))
    variables = dict(given.get("chat_template_kwargs", {}))
    check_variables(variables)
    if "reasoning_effort" in given:
        variables.setdefault("reasoning_effort", given["reasoning_effort"])
    if has_structure or given.get("reasoning_effort") == "none":
        # A grammar begins with the answer proper. Templates that know no such variable ignore it.
        variables.setdefault("enable_thinking", False)
    continues = given.get("continue_final_message", False)
    if continues and given.get("add_generation_prompt", False):
        name = "continue_final_message"
        raise ApiError(400, f"{name} and add_generation_prompt exclude each other", name)
    return Conversation(
        messages,
        tools.functions if tools.may_be_called else None,
        variables,
        continues,
        given.get("add_generation_prompt", True),
    )
