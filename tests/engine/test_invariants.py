"""Controller and slots under a Hypothesis state machine.

What the books say is what the moves put there.
"""

from __future__ import annotations

import numpy as np
import tiny_experts
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller, Move, Scored, Step, loads
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool

LAYERS, EXPERTS, TOP_K = 3, 6, 2
chosen = st.permutations(range(EXPERTS)).map(lambda order: order[:TOP_K])
ids_of = st.lists(chosen, min_size=1, max_size=4)


class TrafficMachine(RuleBasedStateMachine):
    """Slots are played by a dict: slot -> (layer, expert) that was sent there last."""

    @initialize(
        shared=st.booleans(),
        cache=st.sampled_from(["adaptive", "lru", "mrs", "static"]),
        prefetch=st.sampled_from(["expected", "impact", "score", "off"]),
        scheduler=st.sampled_from(["hybrimoe", "accelerator_only", "static", "greedy"]),
        on_cpu=st.sampled_from([(), (1,)]),
        deferred=st.booleans(),
    )
    def start(
        self,
        shared: bool,
        cache: str,
        prefetch: str,
        scheduler: str,
        on_cpu: tuple[int, ...],
        deferred: bool,
    ) -> None:
        chosen = Settings(cache=cache)
        costs = tiny_experts.costs()
        made = make_scheduler(scheduler, costs, True)
        policy = make_cache(cache, LAYERS, EXPERTS, TOP_K, chosen)
        pool = SlotPool([2, 0, 3], staging=4, shared=shared, on_cpu=on_cpu)
        prefetcher = make_prefetcher(prefetch, made)
        self.controller = Controller(pool, costs, made, made, policy, prefetcher, 100, deferred)
        self.held: dict[int, tuple[int, int]] = {}
        self.now_us = 0.0
        self.play(self.controller.warm_start())

    def play(self, moves: list[Move] | tuple[Move, ...]) -> None:
        for move in moves:
            self.held[move.slot] = move.layer, move.expert

    @rule(
        layer=st.integers(0, LAYERS - 1),
        ids=ids_of,
        predicted=ids_of,
        late=st.booleans(),
        cancel=st.booleans(),
    )
    def call(
        self, layer: int, ids: list[list[int]], predicted: list[list[int]], late: bool, cancel: bool
    ) -> None:
        topk = np.array(ids)
        weights = np.full(topk.shape, 0.5, np.float32)
        scored = Scored(topk, weights, None)
        before = self.controller.counters.snapshot()
        step = self.controller.begin(layer, loads(topk), len(topk), self.now_us, scored)
        self.check_plan(step)
        if cancel:
            for expert, slot in self.controller.stale(step):
                assert self.held.pop(slot) == (layer, expert)
                self.controller.withdraw(layer, expert)
        self.play_waves(step)
        self.look_ahead(step, loads(np.array(predicted)))
        self.controller.finish(step)
        counted = self.controller.counters.since(before)
        assert counted.cache_hits <= len(step.routed) == counted.activations
        if not late:
            self.now_us += step.plan.makespan_us + 500.0

    def play_waves(self, step: Step) -> None:
        """As the engine does it: a wave is sent before the one before it is computed."""
        wave = self.controller.pool.staging // 2
        for first in range(0, len(step.moves), wave):
            end = first + wave
            self.play(step.moves[first:end])
            for move in step.moves[max(0, first - wave) : end]:
                assert self.held[move.slot] == (step.layer, move.expert)

    def look_ahead(self, step: Step, predicted: dict[int, int]) -> None:
        later = range(step.layer + 1, LAYERS)
        ahead = [(layer, predicted) for layer in later]
        moves = self.controller.look_ahead(step, ahead, self.now_us)
        slot_of = self.controller.pool.slot_of
        leased = {slot_of(step.layer, expert) for expert in step.plan.accelerator}
        filled = {move.slot for move in moves}
        assert not leased & filled, "a prefetch was given a slot that computes"
        self.play(moves)

    def check_plan(self, step: Step) -> None:
        routed = sorted(item.expert for item in step.routed)
        assert sorted(step.plan.cpu + step.plan.accelerator) == routed
        if step.layer in self.controller.pool.on_cpu:
            assert not step.plan.accelerator and not step.moves
        assert {move.expert for move in step.moves} == set(step.plan.onload)
        resident = set(step.plan.accelerator) - set(step.plan.onload)
        for expert in resident:
            slot = self.controller.pool.slot_of(step.layer, expert)
            assert slot is not None
            assert self.held[slot] == (step.layer, expert)

    @rule(share=st.sampled_from([0.75, 0.5]))
    def shrink(self, share: float) -> None:
        quotas = list(self.controller.pool.quotas)
        wanted = [int(quota * share) for quota in quotas]
        moves = self.controller.shrink(share)
        self.held.clear()
        self.play(moves)
        assert self.controller.pool.quotas == wanted

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "controller"):
            return
        pool = self.controller.pool
        counts = self.controller.counters
        pool.check_integrity()
        for layer, cached in enumerate(pool.cached):
            for expert, slot in cached.items():
                assert self.held.get(slot) == (layer, expert), "the books and the slots differ"
        assert not pool._leased
        assert counts.prefetches >= counts.prefetches_used + counts.prefetches_wasted
        assert counts.activations == counts.experts_cpu + counts.experts_accelerator
        assert counts.link_bytes == 100 * counts.transferred


TrafficMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
TestTraffic = TrafficMachine.TestCase
