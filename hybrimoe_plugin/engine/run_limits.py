"""What limited a run: who each layer call waited for, added up over its timeline."""

from __future__ import annotations

from collections import defaultdict

from hybrimoe_plugin.policy.schedule import Simulation

_PAUSE_US = 1e6
"""A longer gap before a new pass is nobody's work: somebody types the next question."""

_NAMES = {
    "link": "the link",
    "cpu": "the CPU",
    "accelerator": "the accelerator",
    "host": "the rest of the model and the host",
}
_LANES = {"cpu": "CPU", "accelerator": "accelerator", "link": "link"}


class RunLimits:
    """Shares of the time that each part of the machine made a run wait for it.

    The side that finishes last limits a call. Where that is the accelerator, the link limits the
    time that it waited for an expert to arrive. What passes between two calls is attention, other
    dense parts and Python: the host's share.
    """

    def __init__(self) -> None:
        self._limited_us: dict[str, float] = defaultdict(float)
        self._busy_us: dict[str, float] = defaultdict(float)
        self._last: tuple[int, float] | None = None
        """Layer and end of the newest call."""

    def add(self, layer: int, start_us: float, spent_us: float, run: Simulation) -> None:
        """Count one layer call.

        Args:
            run: how its plan goes in the machine model; its times are scaled to `spent_us`.
        """
        self._pass_to(layer, start_us)
        self._last = layer, start_us + spent_us
        scale = spent_us / run.makespan_us if run.makespan_us > 0 else 0.0
        ends: dict[str, float] = defaultdict(float)
        busy: dict[str, float] = defaultdict(float)
        for piece in run.slices:
            ends[piece.lane] = max(ends[piece.lane], piece.end_us * scale)
            busy[piece.lane] += (piece.end_us - piece.start_us) * scale
        for lane, us in busy.items():
            self._busy_us[lane] += us
        if not ends["accelerator"] or ends["cpu"] > ends["accelerator"]:
            self._limited_us["cpu"] += spent_us
            return
        idle_us = max(0.0, ends["accelerator"] - busy["accelerator"])
        waited_us = min(idle_us, ends["link"])
        self._limited_us["link"] += waited_us
        self._limited_us["accelerator"] += spent_us - waited_us

    def shares(self) -> dict[str, float]:
        """Of `link`, `cpu`, `accelerator` and `host`: 1 in all, or nothing without a call."""
        total = sum(self._limited_us.values())
        if not total:
            return {}
        return {name: self._limited_us[name] / total for name in _NAMES}

    def text(self) -> str:
        """The shares as one line, the largest first; `no layer call was recorded` without any."""
        shares = self.shares()
        if not shares:
            return "no layer call was recorded"
        order = sorted(shares, key=lambda name: -shares[name])
        first, *others = [
            f"{_NAMES[name]} for {shares[name]:.0%}" for name in order if shares[name] >= 0.005
        ]
        first += " of the time"
        total = sum(self._limited_us.values())
        busy = [
            f"{label} {self._busy_us[lane] / total:.0%}"
            for lane, label in _LANES.items()
            if self._busy_us[lane]
        ]
        rest = f", {', '.join(others)}" if others else ""
        return f"limited by {first}{rest} (busy: {', '.join(busy)})"

    def _pass_to(self, layer: int, start_us: float) -> None:
        """Count what has passed since the newest call."""
        if self._last is None:
            return
        last_layer, ended_us = self._last
        gap_us = max(0.0, start_us - ended_us)
        new_pass = layer <= last_layer
        if not (new_pass and gap_us > _PAUSE_US):
            self._limited_us["host"] += gap_us
