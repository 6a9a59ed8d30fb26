"""What native kernels would end the process for is refused, or gives what torch gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import tiny

pytestmark = pytest.mark.slow

needs.kt_kernel()

ROOT = Path(__file__).resolve().parents[2]
QUANTISED = ("_exps.weight", "attn_k.", "attn_v.", "attn_output", "token_embd", "output.")


def stored_type(name: str) -> str:
    return "Q8_0" if any(part in name for part in QUANTISED) else "F32"


def test_no_input_ends_the_process(tmp_path: Path) -> None:
    paths = []
    for family in ("mixtral", "deepseek_v2"):
        (tmp_path / family).mkdir()
        paths.append(tiny.write(tmp_path / family, family, types=stored_type))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("wrong_inputs.py"), *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")
    ]  # ggml may write there too
    outcomes = {name: (kind, text) for name, kind, text in lines}
    assert done.returncode == 0, (
        f"ended by {done.returncode} after {list(outcomes)[-1:]}: {done.stderr[-500:]}"
    )
    for name, (kind, text) in outcomes.items():
        as_torch = "epsilon" in name or name.endswith("in an embedding")
        ours = (
            "InputError",
            "BackendError",
            *(("IndexError",) if "without a batch" in name else ()),
        )  # transformers'
        assert kind in (("",) if as_torch else ours), f"{name}: {kind} {text}"
    assert len(outcomes) > 60
