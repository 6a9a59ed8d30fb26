"""The GPU check is killed at random: no finished line is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from eval.gpu_check import results
from eval.reporting.journal import Journal

ROOT = Path(__file__).resolve().parents[3]

COUNTS = """
import os, time
def run(place):
    with open(place.out / "finished.txt", "ab", buffering=0) as told:
        for number in range(40):
            yield {"case": f"row {number}", "pid": os.getpid()}
            told.write(f"NAME row {number}\\n".encode())  # only after the row before has been kept
            time.sleep(0.01)
"""


def test_random_kills_lose_no_finished_line(
    tmp_path: Path,
    make: Any,
) -> None:
    """Stages and the check itself are killed at random; what had been kept is there, and the rest
    follows.
    """
    seed = random.randrange(1000)
    print(f"seed {seed}")
    draw, out = random.Random(seed), tmp_path / "out"
    stages = [make("first", COUNTS), make("second", COUNTS)]
    code = (
        "import sys\n"
        "from eval.gpu_check import question\n"
        "from eval.gpu_check.plan import Stage\n"
        f"stages = [Stage(*fields) for fields in {[tuple(stage) for stage in stages]!r}]\n"
        "question.main(sys.argv[1:], stages)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "--emulated",
        "--out",
        str(out),
        "--scratch",
        str(tmp_path / "s"),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for round_ in range(3):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        journal = Journal(out / "results.jsonl")
        before = len(journal.rows())
        while process.poll() is None and len(journal.rows()) < before + draw.randint(3, 30):
            time.sleep(0.02)
        rows = [line for line in journal.rows() if "pid" in line]
        victim = process.pid if round_ == 2 else rows[-1]["pid"]
        if draw.random() < 0.5:
            with (out / "results.jsonl").open("ab") as file:
                file.write(b'{"stage": "first", "case": "torn')  # as a full disk leaves it
        _kill(victim)
        if victim == process.pid:
            process.wait(30)
            _wait_until(lambda rows=rows: not _runs(rows[-1]["pid"]))  # no stage outlives the check
        else:
            process.wait(120)
        told = (out / "finished.txt").read_text().split("\n")[:-1]
        kept = {f"{line['stage']} {line['case']}" for line in Journal(out / "results.jsonl").rows()}
        assert set(told) <= kept
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = results.merged(Journal(out / "results.jsonl").rows())
    assert results.done(lines) == {"first", "second"}
    assert [line["case"] for line in results.rows(lines, "second")] == [
        f"row {number}" for number in range(40)
    ]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may just have ended
        os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _wait_until(
    there: Any,
    seconds: float = 20,
) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)
