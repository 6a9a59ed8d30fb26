"""The load test for longer: `python -m tests.serve.load [--requests N] [--clients N] [--seed N]
[--accelerator none|emulated]`.

Prints what became of the requests and how the process's memory went. The exit status is 1 if an
answer was lost or wrong, or if something stays behind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

HELPERS = Path(__file__).parents[2] / "helpers"


def main() -> int:
    # As tests/conftest.py has them.
    sys.path[:0] = [str(room) for room in sorted(HELPERS.iterdir())]
    torch.set_num_threads(1)
    return _run(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.serve.load", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", choices=("none", "emulated"), default="none")
    return parser.parse_args()


def _run(args: argparse.Namespace) -> int:
    from tests.serve.load import crowd
    from tests.serve.load.world import EMULATED, prepare, world

    settings = EMULATED if args.accelerator == "emulated" else {}
    with tempfile.TemporaryDirectory() as folder, world(prepare(Path(folder)), **settings) as made:
        began = time.monotonic()
        report = crowd.run(made, args.clients, args.requests, args.seed)
        seconds = time.monotonic() - began
        time.sleep(1)  # those who left last are noticed
        left = made.service.scheduler.load()
    print(*report.wrong[:20], sep="\n")
    print(f"{report.done.total()} right, {len(report.wrong)} wrong in {seconds:.0f} s")
    print(*(f"{name}: {count}" for name, count in report.done.most_common()), sep=", ")
    print("RSS in MiB:", *(size >> 20 for size in report.rss))
    print(left)
    return 1 if report.wrong or left.running or left.waiting or left.kv_bytes else 0


if __name__ == "__main__":
    raise SystemExit(main())
