"""The engine's counters as Prometheus reads them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from hybrimoe_plugin.policy.counters import Counters

log = logging.getLogger(__name__)

_FRESH_SECONDS = 1.0
_WAIT_SECONDS = 2.0
"""For the running pass to end, and its counters to be whole; older ones are shown then."""


class EngineCounters(Collector):
    """Counts of experts, link and plans.

    Args:
        stats: gives them; it may wait for a whole pass of the model.
        name: the model's.
    """

    def __init__(self, stats: Callable[[], Counters], name: str) -> None:
        self._stats = stats
        self._name = name
        self._kept = Counters()
        self._read_at = -_FRESH_SECONDS
        self._reading: asyncio.Task[Counters] | None = None

    async def refresh(self) -> None:
        """Read them unless that was just done. Waits in a thread, of which there is one at most."""
        if self._reading is None:
            if time.monotonic() - self._read_at < _FRESH_SECONDS:
                return
            self._reading = asyncio.create_task(asyncio.to_thread(self._stats))
            self._reading.add_done_callback(self._take)
        await asyncio.wait({self._reading}, timeout=_WAIT_SECONDS)

    def _take(self, reading: asyncio.Task[Counters]) -> None:
        self._reading = None
        if reading.cancelled():
            return
        error = reading.exception()
        if error is not None:
            log.warning("the engine's counters cannot be read: %s", type(error).__name__)
            return
        self._kept = reading.result()
        self._read_at = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        found = self._kept
        yield self._counter("layer_calls", "Calls of layers with experts.", found.calls)
        yield self._counter(
            "expert_hits", "Experts needed that were cached or on their way.", found.cache_hits
        )
        misses = found.activations - found.cache_hits
        yield self._counter("expert_misses", "Experts needed that were not.", misses)
        yield self._places(found)
        yield self._counter(
            "link_bytes", "Bytes of experts that crossed the link.", found.link_bytes
        )
        yield self._counter("demand_loads", "Experts loaded when needed.", found.demand_loads)
        yield self._counter("prefetches", "Experts sent ahead of their layer.", found.prefetches)
        yield self._counter(
            "prefetches_used", "Those that their layer then needed.", found.prefetches_used
        )
        yield self._counter(
            "prefetches_wasted", "Those evicted before any use.", found.prefetches_wasted
        )
        yield self._counter("evictions", "Experts evicted from the cache.", found.evictions)
        yield self._counter("plan_seconds", "Time in planning.", found.plan_us / 1e6)
        yield self._counter(
            "moe_seconds",
            "Time in layers with experts; simulated where the accelerator is emulated.",
            found.moe_us / 1e6,
        )

    def _places(self, found: Counters) -> Metric:
        family = CounterMetricFamily(
            "hybrimoe_experts_computed",
            "Experts computed, by place.",
            labels=["model_name", "place"],
        )
        family.add_metric([self._name, "cpu"], found.experts_cpu)
        family.add_metric([self._name, "accelerator"], found.experts_accelerator)
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(f"hybrimoe_{name}", about, labels=["model_name"])
        family.add_metric([self._name], value)
        return family
