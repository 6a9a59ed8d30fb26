"""llama.cpp's own benchmark, as it is installed.

Builds differ in their options, so `--help` is asked first.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_S = 100.0
"""Of one run, which loads the model anew. The stage has time for two of them and what comes behind.
"""


class LlamaBenchError(Exception):
    """It cannot be asked, did not run, or said what cannot be read."""


class Answer(NamedTuple):
    """One test's rates."""

    prompt_tokens: int
    """0 where single tokens were generated."""
    tok_s: list[float]
    """Of each repetition, in order."""
    version: str


class Placement(NamedTuple):
    """Where experts go."""

    flags: list[str]
    note: str
    """What it means, in words for the table."""


class LlamaBench:
    """An installed `llama-bench`.

    Raises:
        LlamaBenchError: it does not start, or is too old to keep experts in host memory.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Wherever it prints: builds of some versions end with an error status after the usage.
        done = _run([path, "--help"], timeout_s=30.0)
        self.usage = done.stdout + done.stderr
        self.flags = frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", self.usage))
        if "--n-cpu-moe" not in self.flags:
            raise LlamaBenchError(
                "it knows no --n-cpu-moe: it is no llama-bench, or older than September 2025"
            )

    def placement(self, cached_bytes: int, layers: int) -> Placement:
        """As many bytes of experts on the card, through the expert cache where this build has one.

        Args:
            layers: all of them have experts.
        """
        mib = cached_bytes >> 20
        all_in_host = ["-ncmoe", str(layers)]
        if "--moe-cache-mib" in self.flags:
            return Placement(
                [*all_in_host, "--moe-cache-mib", str(mib)], f"an expert cache of {mib} MiB"
            )
        if re.search(
            r"--moe-cache\s+<[^>]*MiB", self.usage
        ):  # forks had the cache first, under this name
            return Placement(
                [*all_in_host, "--moe-cache", str(mib)],
                f"an expert cache of {mib} MiB (--moe-cache)",
            )
        kept = layers // 2
        note = (
            f"this llama-bench has no expert cache: the experts of {kept} of {layers} layers are "
            f"on the card and the "
            "others are computed on the CPU"
        )
        return Placement(["-ncmoe", str(layers - kept)], note)

    def command(
        self, gguf: Path, placement: Placement, threads: int, repetitions: int
    ) -> list[str]:
        """Without what is to be measured."""
        command = [self.path, "-m", str(gguf), "-ngl", "99", *placement.flags, "-t", str(threads)]
        # Read, not mapped, so that experts lie in pinned memory, from which they are copied
        # fastest.
        if "--load-mode" in self.flags:
            command += ["--load-mode", "none"]
        elif "--mmap" in self.flags:
            command += ["--mmap", "0"]
        return [*command, "-r", str(repetitions), "-o", "json"]

    def measure(
        self, command: Sequence[str], prompts: Sequence[int], generated: int, depth: int
    ) -> list[Answer]:
        """Rates of prompts, or of single tokens if `generated` is not 0.

        Args:
            command: as `command` gives it.
            prompts: their lengths.
            generated: number of single tokens.
            depth: tokens before the first of them.

        Raises:
            LlamaBenchError: no answer that can be read.
        """
        what = ["-p", ",".join(map(str, prompts)) or "0", "-n", str(generated)]
        if depth and "--n-depth" in self.flags:
            what += ["-d", str(depth)]
        done = _run([*command, *what], TIMEOUT_S)
        if done.returncode:
            raise LlamaBenchError(
                f"it ended with status {done.returncode}: {last_line(done.stderr)}"
            )
        return answers(done.stdout)


def answers(output: str) -> list[Answer]:
    """What `-o json` prints. Raises: LlamaBenchError: it is not that."""
    try:
        found: list[dict[str, Any]] = json.loads(output[output.index("[") :])
        return [
            Answer(
                int(test["n_prompt"]),
                [float(rate) for rate in test["samples_ts"]],
                f"b{test['build_number']} ({test['build_commit']}), "
                f"{test.get('backends', 'backend unknown')}",
            )
            for test in found
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise LlamaBenchError(
            f"its answer cannot be read ({type(error).__name__}: {error})"
        ) from error


def _run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LlamaBenchError(f"it does not run ({type(error).__name__}: {error})"[:200]) from error


def last_line(text: str) -> str:
    """What a process said last, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
