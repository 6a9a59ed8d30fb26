"""Independent simulations side by side: one process for each core."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

from tqdm.auto import tqdm

Job = TypeVar("Job")
Found = TypeVar("Found")


def mapped(work: Callable[[Job], Found], jobs: Sequence[Job], what: str = "") -> list[Found]:
    """The results in the order of the jobs; `work` must be a module's function.

    Processes are spawned: a fork of a process with torch's threads could hang.

    Args:
        what: says on a terminal what is being done, beside a bar; empty for no bar.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    bar = partial(tqdm, total=len(jobs), desc=what, disable=None if what else True)
    if cores == 1:
        return list(bar(map(work, jobs)))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        return list(bar(pool.map(work, jobs, chunksize=2)))
