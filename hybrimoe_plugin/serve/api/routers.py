"""All endpoints of the server."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from hybrimoe_plugin.serve.api import metrics, models, status
from hybrimoe_plugin.serve.service import Service

ENDPOINTS: tuple[Callable[[Service], APIRouter], ...] = (
    models.router,
    status.router,
    metrics.router,
)


def all_routers(service: Service) -> list[APIRouter]:
    """Every endpoint, for one model."""
    return [endpoint(service) for endpoint in ENDPOINTS]
