"""Time work on the device alone.

The device sleeps until the host has queued everything, so that launches are not counted.
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
"""About 1 ms of the device's clock: longer than a few launches take."""

MOST_SLEEP_CYCLES = 256_000_000
"""About 0.15 s. Work that the host cannot queue in that time is timed with its launches."""


def device_us(
    work: Callable[[], object],
    device: torch.device,
    repeats: int = REPEATS,
    warm_ups: int = WARM_UPS,
    ahead: bool = True,
) -> float:
    """Median time in us that the device takes for some work; stops the host.

    Args:
        work: queues device operations on the current stream. The first `warm_ups` runs, which may
            compile kernels, do not count.
        ahead: let the device sleep before each run, so that it starts only once the host has
            queued everything. Otherwise launches count wherever the device is faster than the
            host.
    """
    with torch.cuda.device(device):
        for _ in range(warm_ups):
            work()
        torch.cuda.synchronize(device)
        times: list[float] = []
        sleep = SLEEP_CYCLES if ahead else 0
        while len(times) < repeats:
            spent, too_short = _time_once(work, device, sleep)
            if too_short and sleep < MOST_SLEEP_CYCLES:
                sleep *= 2  # and time this run again
            else:
                times.append(spent)
    return statistics.median(times)


def cuda_timer(device: torch.device) -> Timer:
    """`device_us` on one device, with its defaults."""
    return lambda work: device_us(work, device)


def _time_once(work: Callable[[], object], device: torch.device, sleep: int) -> tuple[float, bool]:
    """Time in us between two events, and whether the sleep was too short.

    It was too short if the device began before the host had queued everything.
    """
    stream = torch.cuda.current_stream(device)
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    if sleep:
        torch.cuda._sleep(sleep)
    begin.record(stream)
    work()
    end.record(stream)
    too_short = bool(sleep) and begin.query()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3, too_short
