"""SlotPool: a Hypothesis state machine with the invariants after every step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.policy.slots import FEWEST_STAGING, SlotPool

LAYERS, EXPERTS = 3, 6


class SlotMachine(RuleBasedStateMachine):
    shared = False

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool([2, 0, 3], FEWEST_STAGING + 2, self.shared)
        self.leased: set[tuple[int, int]] = set()

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def place(self, layer: int, expert: int) -> None:
        if self.pool.has_room(layer) and self.pool.slot_of(layer, expert) is None:
            slot = self.pool.place(layer, expert)
            assert self.pool.slot_of(layer, expert) == slot and self.pool.in_flight(layer, expert)
        else:
            with pytest.raises(ValueError, match="no room"):
                self.pool.place(layer, expert)

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def arrive(self, layer: int, expert: int) -> None:
        if self.pool.slot_of(layer, expert) is not None:
            self.pool.arrive(layer, expert)
            assert not self.pool.in_flight(layer, expert)

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def evict(self, layer: int, expert: int) -> None:
        if self.pool.slot_of(layer, expert) is None:
            return
        if expert in self.pool.evictable(layer):
            self.pool.evict(layer, expert)
            assert self.pool.slot_of(layer, expert) is None
        else:
            assert self.pool.in_flight(layer, expert) or (layer, expert) in self.leased
            with pytest.raises(ValueError, match="in flight or leased"):
                self.pool.evict(layer, expert)

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.sets(st.integers(0, EXPERTS - 1)))
    def lease(self, layer: int, experts: set[int]) -> None:
        self.pool.lease(layer, experts)
        self.leased |= {
            (layer, expert) for expert in experts if self.pool.slot_of(layer, expert) is not None
        }

    @precondition(lambda self: self.leased)
    @rule()
    def release(self) -> None:
        self.pool.release()
        self.leased.clear()

    @rule()
    def stage(self) -> None:
        slot = self.pool.stage()
        assert slot < self.pool.slots and not any(
            slot in held.values() for held in self.pool.cached
        )

    @rule(
        layer=st.integers(0, LAYERS - 1),
        expert=st.integers(0, EXPERTS - 1),
        victim=st.integers(0, EXPERTS - 1),
    )
    def adopt(self, layer: int, expert: int, victim: int) -> None:
        slot, gone = self.pool.stage(), self.pool.slot_of(layer, victim)
        if self.pool.slot_of(layer, expert) is None and victim in self.pool.evictable(layer):
            self.pool.adopt(layer, expert, slot, victim)
            assert self.pool.slot_of(layer, expert) == slot and not self.pool.in_flight(
                layer, expert
            )
            assert victim == expert or self.pool.slot_of(layer, victim) is None
            assert [self.pool.stage() for _ in range(self.pool.unlent_staging)][-1] == gone, (
                "in the same place of the turn"
            )
        elif gone is not None:
            with pytest.raises(ValueError, match="cached already|in flight or leased"):
                self.pool.adopt(layer, expert, slot, victim)

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def lend(self, layer: int, expert: int) -> None:
        left = self.pool.unlent_staging
        if self.pool.slot_of(layer, expert) is not None:
            with pytest.raises(ValueError, match="cached already"):
                self.pool.lend(layer, expert)
            return
        self.pool.changed[layer].clear()
        slot = self.pool.lend(layer, expert)
        assert self.pool.changed[layer] == (set() if slot is None else {expert})
        assert (slot is None) == (left <= FEWEST_STAGING)
        if slot is not None:
            assert self.pool.slot_of(layer, expert) == slot
            assert self.pool.in_flight(layer, expert)
            assert not self.pool.stages(slot)

    @rule(layer=st.integers(0, LAYERS - 1))
    def give_back(self, layer: int) -> None:
        debt = self.pool.debt(layer)
        if self.pool.can_give_back(layer):
            self.pool.give_back(layer)
            assert self.pool.debt(layer) == debt - 1
            return
        with pytest.raises(ValueError, match="owes no staging slot"):
            self.pool.give_back(layer)

    @rule()
    def recover(self) -> None:
        """Everything had arrived: what was lent is staging again."""
        held = {
            slot: ExpertRef(layer, expert)
            for layer, cached in enumerate(self.pool.cached)
            for expert, slot in cached.items()
        }
        self.pool = self.pool.keeping(held)
        self.leased.clear()
        assert self.pool.unlent_staging == self.pool.staging
        assert sum(map(len, self.pool.cached)) == min(len(held), sum(self.pool.quotas)) or (
            not self.shared
        )

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.held == sum(map(len, self.pool.cached))
        for layer, expert in self.leased:
            assert self.pool.slot_of(layer, expert) is not None, "a leased expert was evicted"


SlotMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSlotPool = SlotMachine.TestCase


class SharedSlotMachine(SlotMachine):
    shared = True


SharedSlotMachine.TestCase.settings = SlotMachine.TestCase.settings
TestSharedSlotPool = SharedSlotMachine.TestCase


def test_staging_slots_take_turns() -> None:
    pool = SlotPool([1], staging=3)
    assert [pool.stage() for _ in range(4)] == [1, 2, 3, 1]


def test_an_exchange_is_an_eviction_and_a_placement() -> None:
    plain, fast = (SlotPool([2, 2], shared=True) for _ in range(2))
    for pool in (plain, fast):
        for layer, expert in ((0, 1), (0, 2), (1, 5), (1, 6)):
            pool.place(layer, expert)
            pool.arrive(layer, expert)
    plain.evict(0, 2)
    assert fast.exchange(ExpertRef(0, 2), 1, 7) == plain.place(1, 7)
    fast.check_integrity()
    assert (fast.cached, fast.changed) == (plain.cached, plain.changed)
    assert fast.in_flight(1, 7)


@pytest.mark.parametrize(
    ("victim", "expert"), [(ExpertRef(0, 1), 7), (ExpertRef(0, 2), 7), (ExpertRef(1, 5), 6)]
)
def test_an_exchange_takes_no_slot_in_use_and_places_nothing_twice(
    victim: ExpertRef, expert: int
) -> None:
    pool = SlotPool([2, 2], shared=True)
    for layer, placed in ((0, 1), (0, 2), (1, 5), (1, 6)):
        pool.place(layer, placed)
    for ref in ((0, 2), (1, 5), (1, 6)):
        pool.arrive(*ref)
    pool.lease(0, (2,))
    before = [dict(cached) for cached in pool.cached]
    with pytest.raises(ValueError, match="in flight or leased"):
        pool.exchange(victim, 1, expert)
    assert pool.cached == before
