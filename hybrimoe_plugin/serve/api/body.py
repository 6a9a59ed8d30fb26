"""Bodies of requests: JSON that is fit to be worked with."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from anyio import to_thread
from fastapi import Request

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.service import Service

MOST_NESTED = 64
"""Lists and objects within each other: what comes later may go through them by recursion."""
_LONGEST_NAME = 100


async def read_body(request: Request, service: Service) -> dict[str, Any]:
    """The body, an object for the model that is served.

    Its numbers are finite, its texts are Unicode, and it is not nested deeply.

    Raises:
        ApiError: it is something else.
    """
    # In a thread: 8 MiB of brackets take a second.
    body = await to_thread.run_sync(parse, await request.body())
    check_model(body, service)
    return body


def parse(raw: bytes) -> dict[str, Any]:
    """As `read_body`, of whatever model."""
    try:
        body = json.loads(raw, parse_constant=_refuse)
        # Numbers may be infinite without their names, and texts hold halves of characters.
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        reason = reason.encode("ascii", errors="backslashreplace").decode()
        raise ApiError(400, f"the body is no JSON that can be read: {reason}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    check_nesting(body)
    return body


def check_model(body: dict[str, Any], service: Service) -> None:
    """Refuse other models than the one that is served; a body that names none means that one.

    Raises:
        ApiError: of status 404, or 400 for what is no name.
    """
    name = body.get("model")
    if name is None or name == service.name:
        return
    if not isinstance(name, str):
        raise ApiError(400, "model must be a string", "model")
    raise ApiError(
        404,
        f"the model {name[:_LONGEST_NAME]!r} does not exist: this server has {service.name!r}",
        "model",
        "model_not_found",
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def check_nesting(body: dict[str, Any]) -> None:
    """Refuse what is nested deeply. Raises: ApiError."""
    level: list[Any] = [body]
    for _ in range(MOST_NESTED):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ApiError(400, f"the body is nested more than {MOST_NESTED} times")
