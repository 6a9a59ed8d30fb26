"""The application: endpoints, and errors in the form that clients expect."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.files import one_line
from hybrimoe_plugin.serve.api.errors import ApiError, as_api_error, error_answer
from hybrimoe_plugin.serve.service import Service

_LONGEST_PATH = 200


def build_app(service: Service, routers: Sequence[APIRouter]) -> FastAPI:
    """An application of these endpoints.

    Handlers raise `ApiError`, or any `HybriMoEError`; here it becomes an answer.
    """
    app = FastAPI(
        title=service.name,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    for router in routers:
        app.include_router(router)

    @app.exception_handler(HybriMoEError)
    async def refused(request: Request, error: HybriMoEError) -> JSONResponse:
        return error_answer(request.url.path, as_api_error(error))

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        told = ApiError(error.status_code, _about(request, error))
        answer = error_answer(request.url.path, told)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # Of a body's field, without the word `body` in front.
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_answer(request.url.path, ApiError(400, str(first["msg"]), param))

    return app


def _about(request: Request, error: HTTPException) -> str:
    path = one_line(request.url.path)[:_LONGEST_PATH]
    if error.status_code == 404:
        return f"there is nothing at {path}"
    if error.status_code == 405:
        return f"{path} does not take {request.method[:20]}"
    return str(error.detail)
