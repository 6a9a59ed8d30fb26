"""The documented example runs and says what the documentation shows."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from hybrimoe_plugin.demo import source_path
from hybrimoe_plugin.errors import HybriMoEError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


def test_quickstart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        source_path()
    except HybriMoEError as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "prefetches used" in printed
