"""`GET /health` and `GET /version`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from hybrimoe_plugin import __version__
from hybrimoe_plugin.serve.api.errors import as_api_error
from hybrimoe_plugin.serve.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        """200 as long as answers can be expected; otherwise 503 and the reason."""
        failed = service.scheduler.failed
        if failed is not None:
            state = {"status": "failed", "reason": str(as_api_error(failed))}
        elif service.closing:
            state = {"status": "closing", "reason": "the server is being shut down"}
        else:
            return JSONResponse({"status": "ok"})
        return JSONResponse(state, status_code=503)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    return routes
