"""Stages that are made up for one test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.gpu_check.plan import Stage


@pytest.fixture
def make(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Stage]:
    """Makes a stage of a module's text."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def one(name: str, text: str, limit_s: float = 60, **more: Any) -> Stage:
        module = f"made_{name}"
        path = tmp_path / f"{module}.py"
        path.write_text(text.replace("NAME", name))
        return Stage(name, limit_s, "made up", module=module, **more)

    return one
