"""Fuzz everything that comes from outside: `python -m tests.fuzz [--cases N] [--seconds S] [--only
KIND] [--seed N]`.

A case is bad when it ends by a signal, does not end, raises what is no error of the project's own,
or takes too much memory. What was tried is printed for each bad one, with the seed that makes it
again.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# Before anything that reads them: forked children must not meet threads of their parent.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch

from hybrimoe_plugin.compute.cpu.ggml import TYPES, KernelSpeed, library
from tests.fuzz import (
    forked,
    gguf_cases,
    models,
    pack_cases,
    profile_cases,
    rules_cases,
    trace_cases,
)

KINDS = {
    "gguf": (gguf_cases.cases, 1.0),
    "rules": (rules_cases.cases, 0.1),
    "packs": (pack_cases.cases, 0.05),
    "profiles": (profile_cases.cases, 0.025),
    "traces": (trace_cases.cases, 0.1),
}
"""Makers of cases, and how many of each there are for one GGUF file."""
LEAST = 8
"""Cases of each kind."""
SECONDS = 20
WAITING = 180
MEMORY = 512 << 20


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(1)
    for type_name in sorted(
        TYPES
    ):  # which way is the quicker one need not be measured in every child
        library._SPEEDS[type_name, 1] = KernelSpeed(True, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYBRIMOE_PROFILES"] = str(Path(folder) / "profiles")
        sound = {
            family: models.write(Path(folder) / family, family) for family in gguf_cases.FAMILIES
        }
        limits = _warm_up(sound)
        bad = sum(_fuzz(kind, arguments, Path(folder), sound, limits) for kind in arguments.only)
    print(f"{bad} bad")
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--cases", type=int, default=200, help="damaged GGUF files; of the other kinds fewer"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="the longest that a kind may take"
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _warm_up(sound: dict[str, Path]) -> forked.Limits:
    """Import and measure what every case would; undamaged models must give an answer."""
    import transformers.models.deepseek_v2.modeling_deepseek_v2
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    limits = forked.Limits(SECONDS, WAITING, MEMORY)
    for path in sound.values():
        outcome = limits.run(models.Chat("--gguf_path", str(path)))
        assert outcome.kind == "done", f"an undamaged model: {outcome}"
    return limits


def _fuzz(
    kind: str,
    arguments: argparse.Namespace,
    folder: Path,
    sound: dict[str, Path],
    limits: forked.Limits,
) -> int:
    make, share = KINDS[kind]
    place = folder / "cases" / kind
    place.mkdir(parents=True)
    count, began = max(LEAST, round(share * arguments.cases)), time.monotonic()
    kinds: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    for number, (what, call) in zip(
        range(count), make(random.Random(arguments.seed), place, sound), strict=False
    ):
        if time.monotonic() - began > arguments.seconds and number >= LEAST:
            break
        outcome = limits.run(call)
        kinds[outcome.kind] += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.nbytes)
        if outcome.bad:
            print(f"BAD {kind} {number} (seed {arguments.seed}) {outcome.kind}: {what}", flush=True)
            print(f"    {outcome.detail}", flush=True)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    took = time.monotonic() - began
    print(
        f"{kind}: {told}; slowest {slowest:.1f} s, most memory {largest >> 20} MiB, {took:.0f} s "
        f"in all",
        flush=True,
    )
    return sum(count for kind, count in kinds.items() if kind not in ("done", "refused"))


if __name__ == "__main__":
    sys.exit(main())
