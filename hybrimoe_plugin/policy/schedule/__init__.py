"""Intra-layer scheduling: the CPU computes some routed experts, the accelerator the others."""

from hybrimoe_plugin.policy.schedule.exact import exact_plan
from hybrimoe_plugin.policy.schedule.frontier import optimum_us
from hybrimoe_plugin.policy.schedule.hybrimoe import HybriMoEScheduler
from hybrimoe_plugin.policy.schedule.machine_model import (
    Simulation,
    Slice,
    assemble,
    simulate,
)
from hybrimoe_plugin.policy.schedule.make import make_scheduler
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler, Schedulers

__all__ = [
    "HybriMoEScheduler",
    "Scheduler",
    "Schedulers",
    "Simulation",
    "Slice",
    "assemble",
    "exact_plan",
    "make_scheduler",
    "optimum_us",
    "simulate",
]
