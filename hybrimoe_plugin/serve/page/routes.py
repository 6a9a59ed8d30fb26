"""GET / and the page's modules."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter
from fastapi.responses import Response

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.service import Service

FILES = Path(__file__).parent / "files"
KINDS = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser lets the page do, whatever a model writes into it."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def router(_service: Service) -> APIRouter:
    """The page's own files, which are read once and hold no secret: they need no API key."""
    routes = APIRouter()
    paths = [path for path in FILES.rglob("*") if path.suffix in KINDS]
    found = {path.relative_to(FILES).as_posix(): _File.read(path) for path in paths}

    @routes.get("/")
    async def page() -> Response:
        return found["index.html"].answer()

    @routes.get("/page/{name:path}")
    async def file(name: str) -> Response:
        if name not in found:
            raise ApiError(404, f"the page has no file {name!r}")
        return found[name].answer()

    return routes


class _File(NamedTuple):
    content: bytes
    kind: str

    @classmethod
    def read(cls, path: Path) -> _File:
        return cls(path.read_bytes(), f"{KINDS[path.suffix]}; charset=utf-8")

    def answer(self) -> Response:
        return Response(self.content, media_type=self.kind, headers=HEADERS)
