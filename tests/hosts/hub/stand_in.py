"""A server that speaks the few parts of the hub's protocol that a download uses."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """Repositories, and what was asked for.

    Attributes:
        files: ORG/REPO -> path -> content.
        listed: ORG/REPO -> siblings that the server claims instead of the true ones.
        cut: path -> bytes after which the first download breaks off.
        status: answers with this code, and the hub's error code.
        requests: (method, path, Range header) so far.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.listed: dict[str, list[dict[str, Any]]] = {}
        self.cut: dict[str, int] = {}
        self.status: tuple[int, str] | None = None
        self.requests: list[tuple[str, str, str | None]] = []

    def fetched(self) -> list[str]:
        """Paths of the files whose content was asked for, in order."""
        return [
            path.partition("/resolve/")[2].partition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


@contextlib.contextmanager
def serve() -> Iterator[tuple[StandIn, str]]:
    """(the stand-in, its address)."""
    hub = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, with_body: bool) -> None:
            span = self.headers.get("Range")
            hub.requests.append((self.command, self.path, span))
            if hub.status is not None:
                return self._refuse(*hub.status)
            if self.path.startswith("/api/models/"):
                return self._list(self.path.split("?")[0].removeprefix("/api/models/"))
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            name = rest.partition("/")[2]
            if name not in hub.files.get(repository, {}):
                return self._refuse(404, "EntryNotFound")
            self._send(hub.files[repository][name], name, span, with_body)

        def _list(self, repository: str) -> None:
            if repository not in hub.files:
                return self._refuse(401, "RepoNotFound")
            siblings = hub.listed.get(repository) or [
                {"rfilename": name, "size": len(data)}
                for name, data in hub.files[repository].items()
            ]
            body = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send(self, data: bytes, name: str, span: str | None, with_body: bool) -> None:
            start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
            part = data[start:]
            self.send_response(206 if span else 200)
            self.send_header("ETag", f'"{name.replace("/", "-")}-{len(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(part)))
            if span:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if with_body:
                # A download that breaks off has sent less than it said.
                self.wfile.write(part[: hub.cut.pop(name, len(part))])
            self.close_connection = True

        def _refuse(self, code: int, reason: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", reason)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
