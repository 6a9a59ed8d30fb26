"""Errors as clients of the OpenAI and Anthropic APIs expect them."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.requests import (
    ClosingError,
    LateError,
    PromptError,
    QueueFullError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Status -> what both APIs call it; the others are `api_error`."""


class ApiError(HybriMoEError):
    """A request that is refused.

    Attributes:
        status: of the HTTP answer.
        param: the field of the body that is at fault, if it is one.
        code: OpenAI's name for what is wrong, where it has one.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error: the project's own are said, others are not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error))
    if isinstance(error, ClosingError):
        return ApiError(503, str(error))
    if isinstance(error, LateError):
        return ApiError(504, str(error))
    if isinstance(error, PromptError):
        return ApiError(400, str(error))
    if isinstance(error, HybriMoEError):
        return ApiError(500, str(error))
    return ApiError(500, f"the answer could not be computed ({type(error).__name__})")


def openai_body(error: ApiError) -> dict[str, Any]:
    """The body of OpenAI's endpoints."""
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(error.status, "api_error"),
            "param": error.param,
            "code": error.status if error.code is None else error.code,
        }
    }


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """The body of Anthropic's endpoints."""
    kind = _TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def speaks_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path.startswith("/v1/messages")


def error_answer(path: str, error: ApiError) -> JSONResponse:
    """The whole answer, in the form of the API that the path belongs to."""
    body = anthropic_body(error) if speaks_anthropic(path) else openai_body(error)
    # Clients of both APIs try again by themselves.
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(body, status_code=error.status, headers=headers)
