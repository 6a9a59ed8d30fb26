"""A thread gives its OpenMP team back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNTED = """
import os, time, torch
from hybrimoe_plugin.compute.cpu.openmp import release_team
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
torch.ones(1 << 20).sin()
with_team = len(os.listdir("/proc/self/task"))
release_team()
deadline = time.monotonic() + 10
while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
    time.sleep(0.01)
after = len(os.listdir("/proc/self/task"))
same = bool((torch.ones(1 << 20).sin() == torch.ones(1).sin()).all())
print(with_team - before, after - before, same)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_team_ends_and_is_made_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0", "True"], done.stderr
