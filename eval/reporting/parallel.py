"""Independent simulations side by side: one process for each core."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Found = TypeVar("Found")


def mapped(work: Callable[[Job], Found], jobs: Iterable[Job]) -> list[Found]:
    """The results in the order of the jobs; `work` must be a module's function.

    Processes are spawned: a fork of a process with torch's threads could hang.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if cores == 1:
        return [work(job) for job in jobs]
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, jobs, chunksize=2))
