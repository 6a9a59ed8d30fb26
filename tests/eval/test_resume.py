"""A run that was killed goes on where it stopped, and says what an uninterrupted one would have
said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.cuda import layers, question, summary
from eval.cuda_model import question as cuda_model
from eval.gpu_bench.baselines import JOURNAL
from eval.models.shapes import MODELS
from eval.policies.systems import KTRANSFORMERS, OURS
from eval.reporting import finished, report
from eval.reporting.finished import Finished

no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the emulated accelerator's times are the same each time"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model, two systems, two cache sizes; the code is taken to stay as it is."""
    monkeypatch.setattr(question, "MODELS", MODELS[2:3])
    monkeypatch.setattr(layers, "RATIOS", (0.25, 0.5))
    for module in (layers, summary, cuda_model):
        monkeypatch.setattr(module, "SYSTEMS", (KTRANSFORMERS, OURS))
    monkeypatch.setattr(finished, "code_digest", lambda: "as it is")


def _run(
    out: Path,
    fresh: bool = False,
) -> dict[str, Any]:
    return question.run(argparse.Namespace(out=out, quick=True, fresh=fresh, model="demo"))


def _files(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(out.glob("*.csv"))}


class _Killed(BaseException):
    pass


@no_gpu
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("place", ["layers", "whole models"])
def test_the_same_as_without_an_interruption(
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = _run(tmp_path / "whole")
    module: Any = layers if place == "layers" else cuda_model
    real, measured = module.measure, []

    def measure(*args: Any) -> Any:
        if len(measured) == 2:
            raise _Killed
        measured.append(args)
        return real(*args)

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(_Killed):
        _run(tmp_path / "cut")
    journal = tmp_path / "cut" / JOURNAL
    # Killed once more while a row was written: one phase of the next cell is whole, the other one
    # is torn.
    lines = (tmp_path / "whole" / JOURNAL).read_bytes().splitlines(keepends=True)
    before = journal.read_bytes()
    done = len(before.splitlines())
    kept = before + lines[done] + lines[done + 1][:-40]
    journal.write_bytes(kept)
    measured.clear()
    monkeypatch.setattr(module, "measure", lambda *args: measured.append(args) or real(*args))
    capsys.readouterr()
    assert _run(tmp_path / "cut") == whole
    out = capsys.readouterr().out
    first, *_, last = out.splitlines()
    taken = 2 if place == "layers" else 6
    assert f"{taken} taken from an earlier run" in first
    assert json.loads(last) == whole
    assert len(measured) == 2, (
        "of four cells two were there already, and the torn one was measured again"
    )
    assert _files(tmp_path / "cut") == _files(tmp_path / "whole")
    assert journal.read_bytes().startswith(kept), "nothing that was there is touched"
    monkeypatch.setattr(module, "measure", lambda *args: pytest.fail("everything is measured"))
    assert _run(tmp_path / "cut") == whole
    assert "0 cells to measure, 8 taken" in capsys.readouterr().out


@no_gpu
def test_a_killed_process_loses_no_finished_row(tmp_path: Path) -> None:
    """SIGKILL as soon as a few rows are there."""
    flags = ["--quick", "--model", "mixtral-8x7b", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "eval.cuda", *flags]
    journal = tmp_path / JOURNAL
    process = subprocess.Popen(
        command, cwd=report.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        expected = "36 cells to measure (24 of layers and 12 of whole models), 0 taken"
        assert first.startswith(expected)
        ends = time.monotonic() + 120
        while _lines(journal) < 4:
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    *lines, _ = journal.read_bytes().split(b"\n")
    rows = [json.loads(line) for line in lines if line]
    assert len(rows) >= 4
    for row in rows:
        assert {"gpu", "driver", "torch", "commit", "quick", "question"} <= set(row)
    found = Finished(journal, quick=True, fresh=False)
    if found._conditions["code"] == rows[0]["code"]:  # nobody edits the code just now
        assert found.find() == rows


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
