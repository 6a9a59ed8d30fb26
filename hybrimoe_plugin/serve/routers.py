"""All endpoints of the server."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from hybrimoe_plugin.serve.api import (
    chat_completions,
    completions,
    messages,
    metrics,
    models,
    responses,
    status,
)
from hybrimoe_plugin.serve.live import routes as live
from hybrimoe_plugin.serve.page import routes as page
from hybrimoe_plugin.serve.service import Service

ENDPOINTS: tuple[Callable[[Service], APIRouter], ...] = (
    chat_completions.router,
    completions.router,
    messages.router,
    responses.router,
    models.router,
    status.router,
    metrics.router,
    live.router,
    page.router,
)


def all_routers(service: Service) -> list[APIRouter]:
    """Every endpoint, for one model."""
    return [endpoint(service) for endpoint in ENDPOINTS]
