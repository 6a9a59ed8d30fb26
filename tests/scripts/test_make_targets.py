"""`make` lists its targets, and `make clean` says what it leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = ROOT / "Makefile"


def make(folder: Path, *words: str) -> str:
    """What make prints in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HYBRIMOE_CACHE": str(folder / "kept")}
    done = subprocess.run(
        ["make", "-s", "-f", str(MAKEFILE), f"PYTHON={sys.executable}", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_make_alone_lists_every_target_for_users(tmp_path: Path) -> None:
    listed = dict(line.split(maxsplit=1) for line in make(tmp_path).splitlines())
    told = dict(re.findall(r"^([\w-]+):.*?##  ?(.*)$", MAKEFILE.read_text(), re.MULTILINE))
    assert listed == told
    assert {"chat", "test", "test-wheel", "test-pythons", "clean"} <= set(listed)
    assert max(map(len, make(tmp_path, "help").splitlines())) <= 100


def test_clean_says_what_stays_and_how_to_remove_it(tmp_path: Path) -> None:
    for folder in (".venv", "kept/synthetic"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kept/synthetic/mixtral-2-layers-Q4_K_M-v1.gguf").write_bytes(bytes(2048))
    said = make(tmp_path, "clean")
    assert not (tmp_path / ".venv").exists()
    assert str(tmp_path / "kept") in said and "2.0 KiB in all" in said
    assert f"{sys.executable} -m hybrimoe_plugin cache clear" in said
