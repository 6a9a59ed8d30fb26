"""`POST /v1/completions`: texts or tokens are continued as they are, without a template."""

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
    refused,
    text,
    whole,
    wrong,
)
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.api.openai_completions.exchange import Exchange
from hybrimoe_plugin.serve.api.openai_completions.fields import MOST_TOKEN, Options, options_of
from hybrimoe_plugin.serve.api.openai_completions.structure import (
    STRUCTURE,
    structure_of,
    with_structure,
)
from hybrimoe_plugin.serve.api.openai_completions.text_answers import TextAnswers
from hybrimoe_plugin.serve.requests import PromptError
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.language import Language
from hybrimoe_plugin.serve.text.prompts import Prompt, Prompts

FIELDS: Mapping[str, Check] = {
    **STRUCTURE,
    "logprobs": whole(0),
    "echo": boolean,
    "best_of": whole(1),
    "add_special_tokens": boolean,
    "suffix": refused(("",)),
}
"""This endpoint's own fields; the others are in `fields.COMMON`."""

MAX_TOKENS = 16
"""Where a body names no limit, as OpenAI's."""
MOST_PROMPTS = 128
"""Of one request."""

_slow_ids = list_of(whole(0, MOST_TOKEN), fewest=1)


def _ids(name: str, value: Any) -> list[int]:
    """Token ids. There may be a million, while other requests wait."""
    are_whole = isinstance(value, list) and set(map(type, value)) == {int}
    if are_whole and min(value) >= 0 and max(value) <= MOST_TOKEN:
        found: list[int] = value
        return found
    return _slow_ids(name, value)  # names the one that is wrong


def router(service: Service) -> APIRouter:
    Language.of(service)  # takes a moment, which no request should wait for
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, service)
        return await _answer(service, request, body)

    return routes


async def _answer(service: Service, request: Request, body: dict[str, Any]) -> Response:
    language = Language.of(service)
    logprobs = checked(body, FIELDS).get("logprobs")
    options = options_of(body, FIELDS, service, logprobs, MAX_TOKENS)
    _check(options)
    prompts = await _prompts(body.get("prompt"), options, language.prompts)
    structure = structure_of(options.given)
    wanted = await with_structure(options.wanted, structure, service.tokenizer)
    id = f"cmpl-{uuid.uuid4().hex}"
    questions = []
    before = []
    for at, prompt in enumerate(prompts):
        questions += language.questions(f"{id}-{at}", prompt, wanted, plain=True)
        before += [_echo(prompt, options, language.prompts)] * wanted.choices
    spelling = None if logprobs is None else language.spelling
    writer = TextAnswers(id, service.name, before, spelling)
    return await Exchange(service, request, options, questions, writer).answer()


def _check(options: Options) -> None:
    """Refuse options that do not go together."""
    given = options.given
    if given.get("best_of", options.wanted.choices) != options.wanted.choices:
        raise ApiError(400, "best_of is not supported by this server", "best_of")
    if given.get("echo", False) and "logprobs" in given:
        raise ApiError(400, "logprobs of the prompt, by echo, are not supported", "echo")


def _echo(prompt: Prompt, options: Options, prompts: Prompts) -> str:
    if not options.given.get("echo", False):
        return ""
    return prompts.decode(prompt.ids) if prompt.text is None else prompt.text


async def _prompts(value: Any, options: Options, prompts: Prompts) -> list[Prompt]:
    """A text, token ids, or a list of such."""
    adds = options.given.get("add_special_tokens", True)
    try:
        return [
            await prompts.text(one, adds) if isinstance(one, str) else prompts.ids(one)
            for one in _several(value)
        ]
    except PromptError as error:
        raise ApiError(400, str(error), "prompt") from error


def _several(value: Any) -> list[str] | list[list[int]]:
    name = "prompt"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong(name, "a string, a list of token ids, or a list of several such")
    if isinstance(value[0], str):
        return list_of(text, most=MOST_PROMPTS)(name, value)
    if isinstance(value[0], list):
        return list_of(_ids, most=MOST_PROMPTS)(name, value)
    return [_ids(name, value)]
