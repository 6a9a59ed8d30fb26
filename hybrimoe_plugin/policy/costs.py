"""Costs in microseconds: the measured numbers that every policy decides by."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hybrimoe_plugin.errors import ProfileError

_TABLE = 4096
"""Loads whose times are looked up in a table."""


class CostCurve:
    """Time of one expert over its load, piecewise linear through measured points.

    Args:
        tokens: loads, ascending from at least 1.
        us: time at each; made non-decreasing, since a drop is noise and would let a plan gain by
            adding tokens.

    Raises:
        ProfileError: lengths differ, loads do not ascend, or a time is negative or not finite.
    """

    __slots__ = ("_slope", "_table", "tokens", "us")

    def __init__(self, tokens: Sequence[int], us: Sequence[float]) -> None:
        if not tokens or len(tokens) != len(us):
            raise ProfileError(
                f"a cost curve needs as many times as loads, found {len(tokens)} and {len(us)}"
            )
        if tokens[0] < 1 or any(b <= a for a, b in pairwise(tokens)):
            raise ProfileError(
                f"the loads of a cost curve must ascend from 1, found {list(tokens)[:8]}"
            )
        if any(not 0 <= value < float("inf") for value in us):
            raise ProfileError(
                f"the times of a cost curve must be finite and at least 0, found {list(us)[:8]}"
            )
        rising = [float(us[0])]
        for value in us[1:]:
            rising.append(max(rising[-1], float(value)))
        self.tokens = tuple(int(value) for value in tokens)
        self.us = tuple(rising)
        self._slope = 0.0
        if len(rising) > 1:
            self._slope = (rising[-1] - rising[-2]) / (self.tokens[-1] - self.tokens[-2])
        # The hot path needs small loads thousands of times a second: a list index is faster than a
        # search.
        self._table = [0.0] + [self._interpolate(load) for load in range(1, _TABLE)]

    def __call__(self, load: int) -> float:
        """Time of one expert with this load; 0 for none."""
        return self._table[load] if load < _TABLE else self._interpolate(load)

    def scaled(self, factor: float) -> CostCurve:
        return CostCurve(self.tokens, [value * factor for value in self.us])

    def _interpolate(self, load: int) -> float:
        tokens, us = self.tokens, self.us
        if load >= tokens[-1]:
            return us[-1] + self._slope * (load - tokens[-1])
        after = bisect_right(tokens, load)
        if after == 0:
            return us[0]
        before = after - 1
        share = (load - tokens[before]) / (tokens[after] - tokens[before])
        return us[before] + share * (us[after] - us[before])


class CostModel:
    """The costs of one machine and one expert shape.

    Args:
        cpu: one expert on the CPU, caches warm.
        cpu_first_us: extra time of a layer's first CPU expert (cold caches, thread wake-up; paper
            section 3).
        accelerator: one expert in a slot.
        accelerator_first_us: launch time, once per layer call that uses the accelerator.
        transfer_us: one expert across the link, latency included.
        link_latency_us: the share of `transfer_us` that does not depend on bytes.
        between_layers_us: attention and dense parts between two MoE layers; the link is free to
            prefetch then.
        few_rows: the costs of calls of a few rows, where those were measured by themselves: other
            graphs compute such calls. What is set later is to be set there too.

    Attributes:
        version: another number whenever a cost that plans depend on has been set, so all but
            `between_layers_us`.
    """

    __slots__ = (
        "accelerator",
        "accelerator_first_us",
        "between_layers_us",
        "cpu",
        "cpu_first_us",
        "few_rows",
        "link_latency_us",
        "transfer_us",
        "version",
    )
    version: int

    def __init__(
        self,
        cpu: CostCurve,
        cpu_first_us: float,
        accelerator: CostCurve,
        accelerator_first_us: float,
        transfer_us: float,
        link_latency_us: float = 0.0,
        between_layers_us: float = 0.0,
        few_rows: CostModel | None = None,
    ) -> None:
        self.cpu = cpu
        self.cpu_first_us = cpu_first_us
        self.accelerator = accelerator
        self.accelerator_first_us = accelerator_first_us
        self.transfer_us = transfer_us
        self.link_latency_us = link_latency_us
        self.between_layers_us = between_layers_us
        self.few_rows = few_rows

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in ("between_layers_us", "version"):
            object.__setattr__(self, "version", getattr(self, "version", 0) + 1)

    def for_rows(self, few: bool) -> CostModel:
        """The costs of a call, which may be one of a few rows."""
        return self.few_rows if few and self.few_rows is not None else self

    @property
    def miss_us(self) -> float:
        """What one token's miss costs, roughly: the cheaper of the two ways to deal with it."""
        return min(self.cpu(1), self.transfer_us)
