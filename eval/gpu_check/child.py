"""One stage in a process of its own, which `eval.gpu_check.runner` starts.

python -m eval.gpu_check.child NAME --module PATH --out DIR --scratch DIR
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.reporting.journal import Journal

RESULTS = "results.jsonl"

Row = Mapping[str, Any]


def main() -> int:
    """Run the stage; its rows are in the results file as soon as they are known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--module", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument(
        "--limit", type=float, required=True, help="seconds after which this process will be killed"
    )
    parser.add_argument("--dry", action="store_true")
    parser.add_argument(
        "--card", help="the GPU's name as the check has it; torch may spell it otherwise"
    )
    parser.add_argument("--run", required=True, help="what this run's lines have in common")
    args = parser.parse_args()
    _end_with_parent()
    # A stage that hangs tells in the log where, just before it is killed.
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, args.limit - 2.0))
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7d ms %(name)s: %(message)s")
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import torch

    from eval.gpu_check.place import Place
    from eval.reporting import report

    if args.dry:
        torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    place = Place(args.out, args.scratch, args.dry)
    journal, facts = Journal(args.out / RESULTS), report.facts()
    facts["gpu"] = args.card or facts["gpu"]
    started = time.monotonic()
    for row in importlib.import_module(args.module).run(place):
        known = {"stage": args.name, **_finite(row), "at_s": round(time.monotonic() - started, 3)}
        journal.append({**known, "run": args.run, "emulated": args.dry, **facts})
        print(args.name, dict(row), file=sys.stderr, flush=True)
    return 0


def _finite(row: Row) -> dict[str, Any]:
    """JSON has no NaN: figures that are no numbers become words, which no sum takes for one."""
    odd = {
        name: str(value)
        for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    return {**row, **odd}


def _end_with_parent() -> None:
    """Ask Linux to end this process with its parent.

    Nothing may hold the card after the check was killed.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
