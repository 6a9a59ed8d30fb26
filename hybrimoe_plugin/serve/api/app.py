"""The application: endpoints, and what is around every request."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.api.errors import anthropic_body, as_api_error, openai_body
from hybrimoe_plugin.serve.service import Service


def build_app(service: Service, routers: Sequence[APIRouter]) -> FastAPI:
    """An application of these endpoints.

    Handlers raise `ApiError`, or any `HybriMoEError`; here it becomes an answer.
    """
    app = FastAPI(title=service.name, docs_url=None, redoc_url=None, openapi_url=None)
    for router in routers:
        app.include_router(router)

    @app.exception_handler(HybriMoEError)
    async def refused(request: Request, error: HybriMoEError) -> JSONResponse:
        told = as_api_error(error)
        is_anthropic = request.url.path.startswith("/v1/messages")
        body = anthropic_body(told) if is_anthropic else openai_body(told)
        return JSONResponse(body, status_code=told.status)

    return app
