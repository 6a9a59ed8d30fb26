"""The decision loop of one model: learn -> plan -> place -> look ahead, over pure policies.

The engine drives it with real backends, the replay simulator with a simulated clock: what is
simulated is what runs. All times are microseconds on the caller's clock. Layers are numbered by
position among the MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, LayerPlan, Routed
from hybrimoe_plugin.policy.idle_link import IdleLink
from hybrimoe_plugin.policy.link_time import Idle
from hybrimoe_plugin.policy.residency import Move as Move
from hybrimoe_plugin.policy.residency import Step as Step


class Controller(IdleLink):
    """Owns residency and link bookkeeping of one model and asks the policies.

    Args:
        pool: slots, empty at first.
        prefill: scheduler for calls with more than one token; `decode` for the others.
        expert_bytes: bytes of one expert, for the counters.
    """

    def begin(self, layer: int, loads: Mapping[int, int], tokens: int, now_us: float) -> Step:
        """Plan one layer call and give its demand loads their slots.

        Args:
            loads: expert -> tokens of this call that chose it; only experts with a token.
            tokens: T of this call.
        """
        started = perf_counter_ns()
        self._land(now_us)
        self.row.follow(layer, loads, tokens)
        routed = tuple(
            Routed(expert, load, self._ready_us(layer, expert, now_us))
            for expert, load in loads.items()
        )
        plan = (self.decode if tokens == 1 else self.prefill).plan(
            routed, max(0.0, self.link_free_us - now_us)
        )
        self.pool.lease(layer, plan.accelerator)
        self._value(layer)
        # In a call of many tokens every layer needs most of its experts: none should live at
        # another's cost.
        lenders = range(layer, layer + 1) if tokens > 1 else self._lenders(layer, tokens)
        moves = tuple(self._load(layer, expert, lenders, now_us) for expert in plan.onload)
        self._count(layer, routed, plan, tokens)
        self.confidence.check(layer, loads)
        self._demand[tokens > 1] += 0.02 * (bool(moves) - self._demand[tokens > 1])
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return Step(layer, tokens, routed, plan, moves)

    def learn(
        self,
        layer: int,
        topk_ids: NDArray[np.int64],
        topk_weights: NDArray[np.float32],
        scores: NDArray[np.float32] | None,
    ) -> None:
        """Tell the cache what was scored: ids and weights [T, K], scores [T, E] or None."""
        self.cache.observe(layer, topk_ids, topk_weights, scores)

    def look_ahead(
        self, step: Step, predicted: Iterable[tuple[int, Mapping[int, int]]], now_us: float
    ) -> list[Move]:
        """Spend the link's idle time until the next MoE layer: prefetches first, then fills.

        Args:
            predicted: (layer, expert -> predicted load) of the next layers, nearest first.
            now_us: the start of the running call.

        Source: paper section 4.3 (impact-driven prefetching); confidence, admission and fills are
            ours.
        """
        started = perf_counter_ns()
        spent_us = step.plan.makespan_us + self.costs.between_layers_us
        self._layer_us += 0.1 * (spent_us - self._layer_us) if self._layer_us else spent_us
        idle = Idle(now_us, now_us + spent_us)
        predictions = self._predictions(step, predicted, idle)
        moves = self._prefetch(step, predictions, idle)
        moves += self._fill(step, predictions, idle)
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return moves

    def finish(self, step: Step) -> None:
        """The call has been computed: its demand loads have arrived, its slots may be taken."""
        for move in step.moves:
            if self._arrivals.pop(ExpertRef(move.layer, move.expert), None) is not None:
                self.pool.arrive(move.layer, move.expert)
        self.pool.release()
        if self._in_a_row:
            self._keep_heavier(step)
        self._value(step.layer)
        self._loans.pop(step.layer, None)

    def _load(self, layer: int, expert: int, lenders: range, now_us: float) -> Move:
        """A demand load: into the cache where it admits the expert, else through a staging slot."""
        slot = self._paid_back(layer, expert) if self._in_a_row else None
        if slot is None:
            slot = self._admit(layer, expert, lenders)
        cached = slot is not None
        move = self._send(
            layer, expert, self.pool.stage() if slot is None else slot, now_us, cached
        )
        if cached:
            self.pool.lease(layer, (expert,))
        self.counters.demand_loads += 1
        return move

    def _count(self, layer: int, routed: Sequence[Routed], plan: LayerPlan, tokens: int) -> None:
        counters = self.counters
        counters.calls += 1
        counters.tokens += tokens
        counters.activations += len(routed)
        counters.experts_cpu += len(plan.cpu)
        counters.experts_accelerator += len(plan.accelerator)
        for item in routed:
            if item.ready_us != OFFLOADED:
                counters.cache_hits += 1
                ref = ExpertRef(layer, item.expert)
                if ref in self._unused:
                    ahead = self._unused.pop(ref)
                    self.by_distance[ahead.distance][1] += 1
                    self._used += ahead.alone
                    counters.prefetches_used += 1


def loads(ids: NDArray[np.int64]) -> dict[int, int]:
    """Expert -> number of tokens that chose it, for ids [T, K]."""
    if len(ids) == 1:
        return dict.fromkeys(ids[0].tolist(), 1)
    counts = np.bincount(ids.ravel())
    return {int(expert): int(counts[expert]) for expert in np.flatnonzero(counts)}
