"""Parts of a body that must have a certain shape."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.serve.api.errors import ApiError


def text_at(where: str, value: object) -> str:
    """A string.

    Raises:
        ApiError: it is something else.
    """
    if not isinstance(value, str):
        raise ApiError(400, f"{where} must be a string", where)
    return value


def object_at(where: str, value: object) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: it is something else.
    """
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object", where)
    return value


def objects_at(where: str, value: object) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with where it stands.

    Raises:
        ApiError: it is not a list, or holds something else.
    """
    if not isinstance(value, list):
        raise ApiError(400, f"{where} must be a list", where)
    places = [f"{where}.{at}" for at in range(len(value))]
    return [(place, object_at(place, one)) for place, one in zip(places, value, strict=True)]


def tool_at(where: str, tool: dict[str, Any], schema: str) -> dict[str, Any]:
    """A tool in the shape that chat templates take; `schema` names the field of its parameters.

    Raises:
        ApiError: a field of it has the wrong type.
    """
    function = {"name": text_at(f"{where}.name", tool.get("name"))}
    if tool.get("description") is not None:
        function["description"] = text_at(f"{where}.description", tool["description"])
    parameters = object_at(f"{where}.{schema}", tool.get(schema))
    return {"type": "function", "function": {**function, "parameters": parameters}}


def refuse(where: str, what: object) -> ApiError:
    """The error of something that would change the answer and that this server does not do."""
    return ApiError(400, f"{where}: {str(what)[:80]!r} is not supported by this server", where)
