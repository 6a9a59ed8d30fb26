"""Times work on the device alone: it sleeps until the host has queued everything, so that no launch
is counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], object]], float]
"""Time of one run of some device work, in us."""

REPEATS = 20
WARM_UPS = 3

SLEEP_CYCLES = 2_000_000
"""Of the device's clock, about 1 ms: longer than a few launches take."""

MOST_SLEEP_CYCLES = 256_000_000
"""About 0.15 s. Work that the host cannot queue in that time is timed as it is."""


def device_us(
    work: Callable[[], object],
    device: torch.device,
    repeats: int = REPEATS,
    warm_ups: int = WARM_UPS,
    ahead: bool = True,
) -> float:
    """Median of the time that the device takes for some work, in us; stops the host.

    Args:
        work: queues device operations on the current stream; the first `warm_ups` runs, which may
            compile, do not count.
        ahead: let the device sleep before each run, so that it starts only once the host has queued
            everything. Otherwise launches are counted wherever the device is quicker than the host.
    """
    with torch.cuda.device(device):
        for _ in range(warm_ups):
            work()
        torch.cuda.synchronize(device)
        times: list[float] = []
        sleep = SLEEP_CYCLES if ahead else 0
        while len(times) < repeats:
            spent, overslept = _run(work, device, sleep)
            if overslept and sleep < MOST_SLEEP_CYCLES:
                sleep *= 2  # and time this run again
            else:
                times.append(spent)
    return statistics.median(times)


def cuda_timer(device: torch.device) -> Timer:
    """`device_us` on one device, with its defaults."""
    return lambda work: device_us(work, device)


def _run(work: Callable[[], object], device: torch.device, sleep: int) -> tuple[float, bool]:
    """(time between the events in us, whether the host was still queueing when the device
    began).
    """
    stream = torch.cuda.current_stream(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if sleep:
        torch.cuda._sleep(sleep)
    begin.record(stream)
    work()
    end.record(stream)
    overslept = bool(sleep) and begin.query()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3, overslept
