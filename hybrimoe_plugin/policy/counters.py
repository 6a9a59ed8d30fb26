"""Counters of the engine and the simulator, with defined meanings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed


@dataclass
class Counters:
    """Counts since the last reset.

    An *activation* is one expert needed by one layer call, whatever its load.
    """

    calls: int = 0
    """Layer calls."""
    tokens: int = 0
    """Tokens over all layer calls."""
    activations: int = 0
    """Experts needed, summed over layer calls; equals `experts_cpu + experts_accelerator`."""
    cache_hits: int = 0
    """Activations whose weights were resident or in flight when the call began."""
    experts_cpu: int = 0
    """Activations computed by the CPU."""
    experts_accelerator: int = 0
    """Activations computed by the accelerator."""
    demand_loads: int = 0
    """Experts that crossed the link because the running call's plan asked for them."""
    prefetches: int = 0
    """Experts sent ahead of their layer."""
    prefetches_used: int = 0
    """Prefetched experts that their layer then needed while they were resident or in flight, each
    counted once.
    """
    prefetches_wasted: int = 0
    """Prefetched experts evicted before any use."""
    fills: int = 0
    """Experts brought into the cache after the CPU computed them, in idle link time."""
    evictions: int = 0
    link_bytes: int = 0
    """Bytes of expert weights that crossed the link, by any cause."""
    plan_us: float = 0.0
    """Wall time spent in planning."""
    moe_us: float = 0.0
    """Time in MoE layer calls: wall time, or simulated time when the accelerator is emulated."""

    @property
    def hit_rate(self) -> float:
        return self.cache_hits / self.activations if self.activations else 0.0

    @property
    def transferred(self) -> int:
        """Experts that crossed the link, by any cause."""
        return self.demand_loads + self.prefetches + self.fills

    def count(self, tokens: int, routed: Sequence[Routed], plan: LayerPlan) -> None:
        """A layer call. Mutates."""
        needed = len(routed)
        missing = [item.ready_us for item in routed].count(OFFLOADED)
        self.calls += 1
        self.tokens += tokens
        self.activations += needed
        self.cache_hits += needed - missing
        self.experts_cpu += len(plan.cpu)
        self.experts_accelerator += len(plan.accelerator)

    def count_whole(self, tokens: int, needed: int, spent_us: float) -> None:
        """A layer call that the CPU has computed unplanned. Mutates."""
        self.calls += 1
        self.tokens += tokens
        self.activations += needed
        self.experts_cpu += needed
        self.moe_us += spent_us

    def snapshot(self) -> Counters:
        return replace(self)

    def put(self, other: Counters) -> None:
        """Take over another's counts. Mutates."""
        for item in fields(self):
            setattr(self, item.name, getattr(other, item.name))

    def reset(self) -> None:
        """Begin to count anew. Mutates: whoever shares these counters goes on with them."""
        for item in fields(self):
            setattr(self, item.name, item.default)

    def plus(self, other: Counters) -> Counters:
        """The sum, count by count."""
        more = asdict(other)
        return Counters(**{name: value + more[name] for name, value in asdict(self).items()})

    def since(self, earlier: Counters) -> Counters:
        """The counts between an earlier snapshot and this one."""
        before = asdict(earlier)
        return Counters(**{name: value - before[name] for name, value in asdict(self).items()})
