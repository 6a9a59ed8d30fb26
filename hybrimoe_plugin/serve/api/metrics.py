"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.metrics.metrics import Metrics
from hybrimoe_plugin.serve.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        found = service.metrics
        if not isinstance(found, Metrics):
            raise ApiError(404, "this server keeps no metrics")
        await found.refresh(service.scheduler)
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(found.registry), media_type=None, headers={"content-type": kind})

    return routes
