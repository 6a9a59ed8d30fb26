"""Prefetchers by name."""

from __future__ import annotations

from hybrimoe_plugin.config import PREFETCHERS
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.prefetch.impact import ImpactPrefetcher
from hybrimoe_plugin.policy.prefetch.prediction import Prefetcher
from hybrimoe_plugin.policy.prefetch.score import ScorePrefetcher
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler


def make_prefetcher(name: str, scheduler: Scheduler) -> Prefetcher | None:
    """The prefetcher of that name, None for `off`.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PREFETCHERS:
        raise ConfigError(f"prefetch: expected one of {', '.join(PREFETCHERS)}, found {name!r}")
    if name == "off":
        return None
    if name == "score":
        return ScorePrefetcher()
    return ImpactPrefetcher(scheduler, calibrated=name == "expected")
