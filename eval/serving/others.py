"""What other programs took of the processor while servers were measured."""

from __future__ import annotations

import psutil


def others_seconds() -> float:
    """Processor time since the machine started of all programs but this one and its children.

    Other guests of the same host, which take their time from all programs alike, are among them.
    """
    machine = psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    # Time of guests is in `user` already.
    guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)
    own = psutil.Process()
    mine = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            mine += sum(process.cpu_times()[:4])  # and of its children that have ended
        except psutil.NoSuchProcess:
            continue  # it is among its parent's ended children
    return sum(machine) - idle - guests - mine
