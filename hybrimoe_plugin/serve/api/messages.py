"""`POST /v1/messages` and `/v1/messages/count_tokens`, as Anthropic's."""

from __future__ import annotations

import uuid

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hybrimoe_plugin.serve.api.anthropic.fields import read
from hybrimoe_plugin.serve.api.anthropic.message import Message
from hybrimoe_plugin.serve.api.body import read_body
from hybrimoe_plugin.serve.api.conversations.asked import prompt_of, question_of
from hybrimoe_plugin.serve.api.conversations.exchange import exchange
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.language import Language


def router(service: Service) -> APIRouter:
    """The endpoints of Anthropic's clients."""
    Language.of(service)  # takes a moment, which no request should wait for
    routes = APIRouter()

    @routes.post("/v1/messages")
    async def messages(request: Request) -> Response:
        told = await read_body(request, service)
        body = await run_sync(read, told, service)  # a large one takes seconds
        id = _id(request)
        question = await question_of(service, body.asked, id)
        most = body.asked.wanted.max_tokens or 0
        prompt = len(question.request.prompt)
        message = Message(service.name, prompt, most, body.shows_thinking)
        headers = {"request-id": id}
        return await exchange(service, request, question, message, body.stream, headers)

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        told = {**await read_body(request, service), "max_tokens": 1}
        body = await run_sync(read, told, service)
        prompt = await prompt_of(service, body.asked)
        headers = {"request-id": _id(request)}
        return JSONResponse({"input_tokens": len(prompt.ids)}, headers=headers)

    return routes


def _id(request: Request) -> str:
    """The id that the request has in the log, if it has one."""
    known: str | None = getattr(request.state, "request_id", None)
    return known or f"req_{uuid.uuid4().hex}"
