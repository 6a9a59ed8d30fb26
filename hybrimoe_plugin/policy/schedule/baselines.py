"""Schedulers of other systems, the two one-sided ones, and HybriMoE's as published."""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.machine_model import (
    assemble,
    build_plan,
    heaviest_first,
    lightest_first,
    missing_of,
    present_of,
    simulate,
)
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler


class CPUOnlyScheduler(Scheduler):
    """Everything on the CPU: the only plan there is without an accelerator."""

    name = "cpu_only"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        return build_plan(routed, (), (), self._costs, link_free_us)


class AcceleratorOnlyScheduler(Scheduler):
    """Everything on the accelerator; every miss crosses the link (AdapMoE, mixtral-offloading)."""

    name = "accelerator_only"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        everything = {item.expert for item in routed}
        return assemble(routed, everything, self._costs, link_free_us)


class StaticScheduler(Scheduler):
    """Hits on the accelerator, misses on the CPU (kTransformers)."""

    name = "static"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        hits = {item.expert for item in present_of(routed)}
        return assemble(routed, hits, self._costs, link_free_us)


class RatioScheduler(Scheduler):
    """Hits on the accelerator, a fixed share of the misses over the link, the others on the CPU.

    The share is `cpu / (cpu + transfer)` of one-token times, which is `pcie / (pcie + cpu)` of
    bandwidths. Source: FreeToken.
    """

    name = "ratio"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        cpu = costs.cpu(1)
        both = cpu + costs.transfer_us
        self.share = cpu / both if both > 0 else 0.0

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        missing = sorted(missing_of(routed), key=heaviest_first)
        crossing = round(self.share * len(missing))
        on_accelerator = {item.expert for item in present_of(routed)}
        for item in missing[:crossing]:
            on_accelerator.add(item.expert)
        return assemble(routed, on_accelerator, self._costs, link_free_us)


class GreedyScheduler(Scheduler):
    """The paper's three-queue simulation, as published; the plain twin of `HybriMoEScheduler`.

    Each step commits whichever of the three queues would finish its next expert first: the CPU its
    lightest miss, the link its heaviest miss, the accelerator its heaviest present expert. Without
    misses the CPU takes the lightest present expert. Source: paper section 4.2.
    """

    name = "greedy"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        cpu, done, onload = self._run_queues(routed, link_free_us)
        # The idle CPU can take an expert that had already crossed the link: that transfer was not
        # needed.
        needed = tuple(expert for expert in onload if expert in done)
        plan = LayerPlan(tuple(cpu), tuple(done), needed, 0.0, 0.0, 0.0, 0.0)
        run = simulate(plan, routed, self._costs, link_free_us)
        return plan._replace(
            makespan_us=run.makespan_us,
            cpu_us=run.cpu_us,
            accelerator_us=run.accelerator_us,
            link_us=run.link_us,
        )

    def _run_queues(
        self, routed: Sequence[Routed], link_free_us: float
    ) -> tuple[list[int], list[int], list[int]]:
        """Experts of the CPU, of the accelerator and of the link, each in order."""
        costs = self._costs
        missing = sorted(missing_of(routed), key=lightest_first)
        ready = sorted(present_of(routed), key=heaviest_first)
        cpu: list[int] = []
        done: list[int] = []
        onload: list[int] = []
        # When each queue has finished what it was given so far.
        cpu_at = costs.cpu_first_us
        accelerator_at = costs.accelerator_first_us
        link_at = link_free_us
        while missing or ready:
            # When each queue would finish its next expert.
            cpu_next = missing[0] if missing else ready[-1]
            cpu_end = cpu_at + costs.cpu(cpu_next.load)
            link_end = link_at + costs.transfer_us if missing else OFFLOADED
            accelerator_end = OFFLOADED
            if ready:
                heaviest = ready[0]
                start = max(accelerator_at, heaviest.ready_us)
                accelerator_end = start + costs.accelerator(heaviest.load)
            if accelerator_end <= min(cpu_end, link_end):
                done.append(ready.pop(0).expert)
                accelerator_at = accelerator_end
            elif cpu_end <= link_end:
                queue = missing if missing else ready
                queue.remove(cpu_next)
                cpu.append(cpu_next.expert)
                cpu_at = cpu_end
            else:
                arrived = missing.pop()._replace(ready_us=link_end)
                onload.append(arrived.expert)
                ready.append(arrived)
                ready.sort(key=heaviest_first)
                link_at = link_end
        return cpu, done, onload
