"""`GET /v1/models`: the one that is loaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_entry(service)]}

    # Names of the hub have a slash.
    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"the model here is {service.name}", "model")
        return _entry(service)

    return routes


def _entry(service: Service) -> dict[str, Any]:
    """As OpenAI's, and vLLM's `max_model_len`."""
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "hybrimoe",
        "max_model_len": service.scheduler.context,
    }
