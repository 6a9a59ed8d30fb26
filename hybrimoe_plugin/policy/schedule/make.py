"""Schedulers by name."""

from __future__ import annotations

from hybrimoe_plugin.config import SCHEDULERS
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.baselines import (
    AcceleratorOnlyScheduler,
    CPUOnlyScheduler,
    GreedyScheduler,
    RatioScheduler,
    StaticScheduler,
)
from hybrimoe_plugin.policy.schedule.hybrimoe import HybriMoEScheduler
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler


def make_scheduler(name: str, costs: CostModel, has_accelerator: bool) -> Scheduler:
    """The scheduler of that name; without an accelerator every plan is `cpu_only`.

    Raises:
        ConfigError: unknown name.
    """
    kinds = (
        HybriMoEScheduler,
        GreedyScheduler,
        RatioScheduler,
        StaticScheduler,
        AcceleratorOnlyScheduler,
        CPUOnlyScheduler,
    )
    by_name = {kind.name: kind for kind in kinds}
    if name not in by_name:
        raise ConfigError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, found {name!r}")
    kind = by_name[name if has_accelerator else CPUOnlyScheduler.name]
    scheduler: Scheduler = kind(costs)
    if costs.few_rows is not None:
        scheduler.few_rows = kind(costs.few_rows)
    return scheduler
