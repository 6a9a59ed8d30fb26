"""The GPU check's parent: stages that hang, die or fail cost only themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.gpu_check import question, results
from eval.gpu_check.plan import Stage
from eval.reporting.journal import Journal

SOUND = """
def run(place):
    for number in range(3):
        yield {"case": f"row {number}", "ok": True, "error": 1e-7}
"""
HANGS = """
import time
def run(place):
    yield {"case": "before", "ok": True}
    time.sleep(600)
"""
DIES = """
import os
def run(place):
    yield {"case": "before", "ok": True}
    os.abort()
"""
RAISES = """
def run(place):
    yield {"case": "wrong", "ok": False, "error": 0.5}
    raise ValueError("no such thing")
"""
STARTS_OTHERS = """
import subprocess, sys
def run(place):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"case": "other", "ok": True, "pid": left.pid}
"""


def check(stages: list[Stage], folder: Path, *flags: str) -> dict[str, Any]:
    scratch = folder / "s"
    where = ["--out", str(folder), "--scratch", str(scratch)]
    return question.main(["--emulated", *where, *flags], stages)


def test_a_stage_that_fails_costs_only_itself(
    tmp_path: Path,
    make: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    stages = [make("hangs", HANGS, limit_s=8), make("dies", DIES), make("raises", RAISES)]
    stages += [make("others", STARTS_OTHERS, background=True), make("sound", SOUND, quiet=True)]
    found = check(stages, out)
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == found
    assert found["stages_failed"] == ["dies", "hangs", "raises"]
    assert found["correct"] is False
    assert found["wrong"] == ["raises: wrong"]
    assert found["emulated"] is True
    lines = Journal(out / "results.jsonl").rows()
    kept = {(line["stage"], line["case"]) for line in lines}
    assert ("hangs", "before") in kept
    assert ("dies", "before") in kept
    assert ("raises", "wrong") in kept
    assert ("sound", "row 2") in kept
    ends = {line["stage"]: line for line in lines if line["case"] == results.END}
    dies, hangs, raises = ends["dies"], ends["hangs"], ends["raises"]
    assert dies["status"] == "died"
    assert dies["detail"].startswith("SIGABRT")
    assert hangs["status"] == "timeout"
    assert "killed after" in hangs["detail"]
    assert raises["status"] == "failed"
    assert raises["detail"] == "ValueError: no such thing"
    log = (out / "hangs.log").read_text()
    assert "made_hangs.py" in log, "the log says where it hung"
    for line in lines:
        if line["case"] != results.END:
            assert {"gpu", "driver", "torch", "transformers", "commit", "date"} <= line.keys()
    (other,) = [line for line in lines if line["case"] == "other"]
    assert not _runs(other["pid"]), "what a stage leaves running is ended with it"


def test_a_second_run_does_what_is_left_and_a_named_stage_again(
    tmp_path: Path,
    make: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    stages = [make("raises", RAISES), make("sound", SOUND)]
    check(stages, out)
    make("raises", SOUND)  # mended
    found = check(stages, out)
    assert "already there, and not run again: sound" in capsys.readouterr().err
    # A whole run replaces what the stage said before.
    assert found["stages_failed"] == []
    assert found["wrong"] == []
    check(stages, out, "--stage", "sound")
    lines = Journal(out / "results.jsonl").rows()
    cases = [line["case"] for line in lines if line["stage"] == "sound"]
    assert cases.count("row 0") == 2


def test_a_stage_that_says_wrong_things_and_ends_well_is_run_again(
    tmp_path: Path,
    make: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = SOUND.replace(
        '"ok": True, "error": 1e-7',
        '"ok": number != 1, "error": float("nan"), "detail": "see [/x]"',
    )
    stages = [make("wrong", wrong, judges=True)]
    for _ in range(2):
        found = check(stages, tmp_path)
        assert found["correct"] is False
        assert found["wrong"] == ["wrong: row 1"]
        assert found["stages_failed"] == []
        printed = capsys.readouterr()
        assert "already there" not in printed.err
        assert "[/x]" in printed.out, "what stages say is no markup"
    make("wrong", SOUND)
    found = check(stages, tmp_path)
    assert found["correct"] is True
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == found


def test_two_checks_do_not_share_a_machine(
    tmp_path: Path,
    make: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with question._scratch(tmp_path / "s"):
        found = check([make("sound", SOUND)], tmp_path)
    assert found["stages_missing"] == ["sound"]
    assert "another check is running" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        check([make("sound", SOUND)], tmp_path / "file")


def test_no_time_left_is_said(
    tmp_path: Path,
    make: Any,
) -> None:
    found = check([make("sound", SOUND)], tmp_path, "--limit", "0")
    (line,) = Journal(tmp_path / "results.jsonl").rows()
    assert line["status"] == "skipped"
    assert found["correct"] is None
    assert found["stages_failed"] == []
    assert found["stages_missing"] == ["sound"]


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
