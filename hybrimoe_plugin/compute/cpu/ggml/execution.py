"""Run a finished ggml graph with one thread or with its team."""

from __future__ import annotations

import ctypes
from time import perf_counter_ns
from typing import Any

import numpy as np

from hybrimoe_plugin.compute.cpu.ggml.binding import GgmlBinding, Plan
from hybrimoe_plugin.compute.cpu.ggml.thread_team import ThreadTeam
from hybrimoe_plugin.errors import BackendError


class Execution:
    """The plans of one graph, and how long its runs took.

    Args:
        graph: ggml's pointer.
        threads: the calling thread and this many less one of OpenMP's.
        runs_often: then its times tell whether the team is disturbed.
    """

    def __init__(
        self, binding: GgmlBinding, graph: int, threads: int, team: ThreadTeam, runs_often: bool
    ) -> None:
        self._compute = binding.compute
        self._graph = graph
        self._team = team
        self._runs_often = runs_often
        self._plan_single = _plan(binding, graph, 1)
        self._plan_team = _plan(binding, graph, threads) if threads > 1 else None
        self._single_runs = 0
        self._fastest_single_ns = 1 << 62

    def run(self) -> None:
        """Compute every output. Raises: BackendError: ggml failed."""
        plan, team = self._plan_team, self._team
        # A graph that runs often begins with one thread, to know what that takes.
        single = plan is None or not team.active or (self._runs_often and self._single_runs < 2)
        if single:
            plan = self._plan_single
        started = perf_counter_ns()
        status = self._compute(self._graph, plan)
        took_ns = perf_counter_ns() - started
        if status:
            raise BackendError(f"ggml stopped with status {status}")
        if single:
            self._single_runs += 1
            self._fastest_single_ns = min(self._fastest_single_ns, took_ns)
            team.ran_single()
        elif self._runs_often:
            team.ran_together(took_ns, self._fastest_single_ns)


def _plan(binding: GgmlBinding, graph: int, threads: int) -> Any:
    """A pointer to a plan, which it keeps alive together with its working memory."""
    plan: Plan = binding.plan(graph, threads)
    work = np.empty(max(1, plan.work_size), np.uint8)
    plan.work_data = work.ctypes.data
    plan.work = work
    return ctypes.byref(plan)
