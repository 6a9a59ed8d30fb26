"""A short run of the fuzzer; `make fuzz` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import needs

needs.kt_kernel()


def test_nothing_from_outside_ends_the_process() -> None:
    # In a process of its own: its children are forks, which must not meet this one's threads.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "1000", "--seconds", "30"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("0 bad\n"), (
        done.stdout + done.stderr[-2000:]
    )
