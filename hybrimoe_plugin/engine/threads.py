"""How many threads CPU experts may use."""

from __future__ import annotations

import psutil
import torch

from hybrimoe_plugin.device.machine import hardware


def thread_candidates() -> list[int]:
    """CPU thread counts worth measuring: powers of two, and all cores but one.

    One core is left to the caller, who spins while it waits.
    """
    physical = psutil.cpu_count(logical=False) or 1
    cores = min(int(hardware()["cores"]), physical)
    most = max(1, cores - 1)
    counts = {1, most}
    count = 2
    while count <= most:
        counts.add(count)
        count *= 2
    return sorted(counts)


def shared_threads() -> int:
    """Threads of a backend that computes on torch's own pool.

    As many as torch has: no other pool wants the cores.
    """
    return torch.get_num_threads()
