"""Compile groups of cases in this process."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from eval.kernel_prebuild.driver import Count, make_driver
from eval.kernel_prebuild.groups import AnyCase
from eval.kernel_prebuild.launch import launch

log = logging.getLogger(__name__)


def build(
    share: Sequence[tuple[str, list[AnyCase]]],
    cache: Path,
    arch: int,
    library_path: Path | None,
    deadline: float,
) -> tuple[Count, list[str]]:
    """Compile groups in this process, which can have no other driver afterwards.

    Args:
        share: names of groups, and their cases.
        cache: Triton's cache folder.
        arch: compute capability of the card, 90 for an H100.
        library_path: as in `make_driver`.
        deadline: no group is begun after it, as `time.time` counts.

    Returns:
        what happened, and the names of the groups that there was no time for.
    """
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime.driver import driver

    count = Count()
    driver.set_active(make_driver(arch, library_path, count))
    for number, (name, group) in enumerate(share):
        if time.time() > deadline:
            return count, [name for name, _ in share[number:]]
        compiled_before = len(count.compiled)
        hits_before = count.hits
        begun = time.monotonic()
        for case in group:
            _compile(case, count)
        built = len(count.compiled) - compiled_before
        hits = count.hits - hits_before
        spent = time.monotonic() - begun
        said = f"  {name}: {built} kernels compiled, {hits} found, {spent:.0f} s"
        print(said, file=sys.stderr, flush=True)
    return count, []


def _compile(case: AnyCase, count: Count) -> None:
    """Compile one case's kernels; tuning passes over a tile that does not compile."""
    try:
        launch(case)
    except Exception as error:
        log.debug("%s: %s", case.name, error, exc_info=True)
        count.failed.append(f"{case.name}: {type(error).__name__}: {error}")
