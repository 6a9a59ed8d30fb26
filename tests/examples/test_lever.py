"""The example of a target on flash runs, and its answer makes sense."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from hybrimoe_plugin.demo import source_path
from hybrimoe_plugin.errors import HybriMoEError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lever.py"


def test_lever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    try:
        source_path()
    except HybriMoEError as missing:
        pytest.skip(str(missing))
    monkeypatch.chdir(tmp_path)  # the pack is made there
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "The capital of France is Paris."
    assert any(line.startswith("acceptance length") for line in printed)
