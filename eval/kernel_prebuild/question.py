"""Compile the device kernels on a machine without a GPU, into a cache for one that has it.

The product's own launch code runs on tensors that claim to lie on a GPU, with Triton's CUDA driver
replaced by one that compiles as the real one does and launches nothing. So everything that Triton's
cache key is made of is what it will be on the card: argument types, which of them are multiples of
16, tile sizes and options. The rest of the key (the kernels' source and its line numbers, Triton's
own files, ptxas' version, environment variables that change code) has to be the same there.

    python -m eval.kernel_prebuild --cache DIR

The last line is a JSON object. A second run tells by `compiled` and `launchers_built` what a card
would have to compile: nothing, if all is well (`scripts/gpu_bundle.py` asks that of a copy in
another folder).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.kernel_prebuild.build import build
from eval.kernel_prebuild.driver import Count, empty_libcuda
from eval.kernel_prebuild.facts import facts
from eval.kernel_prebuild.groups import wanted


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compile; gives the contents of the JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.kernel_prebuild",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for TRITON_CACHE_DIR")
    parser.add_argument(
        "--arch", type=int, default=90, help="compute capability, 90 for H100 and H200 (default)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="begin no further group after this long"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only groups whose names begin so"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="not this group; repeatable"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    args.cache.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    groups = []
    for name, group in wanted():
        if name.startswith(args.only) and name not in args.skip:
            groups.append((name, group))
    deadline = time.time() + args.seconds
    total = Count()
    left_out: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    with (
        empty_libcuda() as library_path,
        ProcessPoolExecutor(args.workers, mp_context=spawn) as pool,
    ):
        shares = [groups[first :: args.workers] for first in range(args.workers)]
        jobs = [
            pool.submit(build, share, args.cache, args.arch, library_path, deadline)
            for share in shares
            if share
        ]
        for job in jobs:
            found, missing = job.result()
            total.add(found)
            left_out += missing
    result = {
        **facts(args.arch),
        **asdict(total),
        "compiled": dict(Counter(total.compiled)),
        "left_out": left_out,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result), flush=True)
    return result
