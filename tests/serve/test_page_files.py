"""The page's files as a server hands them out."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hybrimoe_plugin.serve.api.app import build_app
from hybrimoe_plugin.serve.page import routes

FILES = sorted(path for path in routes.FILES.rglob("*") if path.is_file())
MOST_LINES = 350
MODULE_LINES = 250
IMPORTED = re.compile(r'(?:from|src=|href=|import) ?"(/page/[^"]+|\.[^"]+)"')


@pytest.fixture(scope="module")
def client() -> TestClient:
    service: Any = SimpleNamespace(name="tiny")
    return TestClient(build_app(service, [routes.router(service)]))


def test_every_file_is_served_under_the_policy(client: TestClient) -> None:
    paths = ["/", *(f"/page/{path.relative_to(routes.FILES).as_posix()}" for path in FILES)]
    for path in paths:
        for _ in range(2):
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"] == routes.POLICY
            assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["../routes.py", "%2e%2e/routes.py", "/etc/passwd", "x.js", ""])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_files_name_only_each_other() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for name in IMPORTED.findall(text):
            base = routes.FILES if name.startswith("/page/") else path.parent
            target = base / name.removeprefix("/page/")
            assert target.resolve() in FILES, f"{path.name}: {name}"
        outside = set(re.findall(r"https?://[\w.]+", text))
        assert outside <= {"http://www.w3.org"}, path


def test_modules_are_short_and_never_write_markup() -> None:
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= (MODULE_LINES if path.suffix == ".js" else MOST_LINES), path
        assert max(map(len, lines)) <= 100 or path.suffix == ".svg", path
        if path.suffix == ".js":
            for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write"):
                assert word not in "\n".join(lines), path


def test_the_wheel_takes_them_along() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '"serve/page/files/**/*"' in project.read_text(encoding="utf-8")
