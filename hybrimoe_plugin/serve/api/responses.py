"""`POST /v1/responses`, as OpenAI's, without anything that is stored."""

from __future__ import annotations

import uuid

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse

from hybrimoe_plugin.serve.api.body import read_body
from hybrimoe_plugin.serve.api.conversations.asked import question_of
from hybrimoe_plugin.serve.api.conversations.exchange import exchange
from hybrimoe_plugin.serve.api.openai_responses.envelope import envelope
from hybrimoe_plugin.serve.api.openai_responses.fields import read
from hybrimoe_plugin.serve.api.openai_responses.response import Response
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.language import Language


def router(service: Service) -> APIRouter:
    """The endpoint of OpenAI's newer API."""
    language = Language.of(service)  # takes a moment, which no request should wait for
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def responses(request: Request) -> HttpResponse:
        told = await read_body(request, service)
        body = await run_sync(read, told, service)  # a large one takes seconds
        id = getattr(request.state, "request_id", None) or f"resp-{uuid.uuid4().hex}"
        question = await question_of(service, body.asked, id)
        sampling = body.asked.wanted.sampling
        begun = envelope(service.name, told, sampling)
        spelling = None if sampling.logprobs is None else language.spelling
        response = Response(begun, len(question.request.prompt), spelling)
        return await exchange(service, request, question, response, body.stream, {})

    return routes
