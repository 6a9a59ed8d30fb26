"""Bookkeeping of which expert lies in which slot; the bytes belong to a backend.

A slot is free, in flight (its weights are crossing the link) or resident. A leased slot is in use
by a layer call. A slot that is leased or in flight cannot be evicted: `evictable` never lists it
and `evict` refuses it. Staging slots lie beside the cache and hold an expert only for the call that
demand-loads it. In prompts some are lent to the next layer, which then holds more than its share
until it has run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import ExpertRef

FEWEST_STAGING = 4
"""Staging slots that are never lent: two waves of two demand loads."""


class SlotPool:
    """The slots of one link's near side, for all layers.

    Args:
        quotas: cached experts per layer position.
        shared: whether a layer may hold more than its quota at the cost of others; the sum of all
            quotas binds.
        staging: further slots for demand loads that the cache does not admit; at least 2, so that
            one can receive while the other computes.
        on_cpu: layers whose experts no slot can hold; their quotas are 0.
    """

    def __init__(
        self,
        quotas: Sequence[int],
        staging: int = 2,
        shared: bool = False,
        on_cpu: Collection[int] = (),
    ) -> None:
        if staging < 2 or min(quotas, default=0) < 0:
            raise ValueError(
                f"a pool needs 2 staging slots and quotas of at least 0, not {staging} and "
                f"{list(quotas)}"
            )
        self.quotas = list(quotas)
        self.staging = staging
        self.shared = shared
        self.on_cpu = frozenset(on_cpu)
        self.cached: list[dict[int, int]] = [{} for _ in quotas]
        """Expert -> slot, for each layer; in flight ones included."""
        self.changed: list[set[int]] = [set() for _ in quotas]
        """Experts of each layer that have been given a slot or lost one; a reader empties it."""
        self._at_least_one = np.maximum(1.0, quotas)
        """[L] the quotas, as something to divide by."""
        cache_slots = self._cache_slots = sum(quotas)
        self._free = list(reversed(range(cache_slots)))
        """Cache slots without an expert, the next one last."""
        self._staging = list(range(cache_slots, cache_slots + staging))
        self._next_stage = 0
        self._lent = [0 for _ in quotas]
        """Staging slots that each layer has to give back."""
        self._in_flight: set[int] = set()
        self._leased: set[int] = set()

    @property
    def slots(self) -> int:
        """All slots, staging included."""
        return sum(self.quotas) + self.staging

    @property
    def held(self) -> int:
        """Cached experts of all layers, in flight ones included."""
        return self._cache_slots + self.staging - len(self._free) - len(self._staging)

    @property
    def unlent_staging(self) -> int:
        """Staging slots that demand loads can take turns in now."""
        return len(self._staging)

    def slot_of(self, layer: int, expert: int) -> int | None:
        """The cached expert's slot, None for one that is not cached."""
        return self.cached[layer].get(expert)

    def has_room(self, layer: int) -> bool:
        """Whether the layer may have one more slot without an eviction."""
        if not self._free or layer in self.on_cpu:
            return False
        return self.shared or len(self.cached[layer]) < self.quotas[layer]

    def evictable(self, layer: int, keep: Collection[int] = ()) -> list[int]:
        """Experts of a layer whose slots may be taken now, `keep` excepted."""
        busy = self._in_flight
        if self._leased:
            busy = busy | self._leased
        return [
            expert
            for expert, slot in self.cached[layer].items()
            if slot not in busy and expert not in keep
        ]

    def place(self, layer: int, expert: int) -> int:
        """Give an expert a cache slot; its weights are in flight until `arrive`.

        Raises:
            ValueError: no room, or the expert is there already.
        """
        if expert in self.cached[layer] or not self.has_room(layer):
            raise ValueError(f"layer {layer}: no room for expert {expert}, or it is there already")
        slot = self._free.pop()
        self.cached[layer][expert] = slot
        self.changed[layer].add(expert)
        self._in_flight.add(slot)
        return slot

    def evict(self, layer: int, expert: int) -> ExpertRef:
        """Free the slot of an expert.

        Raises:
            ValueError: it is in flight or leased.
        """
        slot = self.cached[layer][expert]
        busy = slot in self._in_flight or slot in self._leased
        if busy:
            raise ValueError(f"layer {layer}: expert {expert} is in flight or leased")
        del self.cached[layer][expert]
        self.changed[layer].add(expert)
        self._free.append(slot)
        return ExpertRef(layer, expert)

    def exchange(self, victim: ExpertRef, layer: int, expert: int) -> int:
        """`evict` one expert and `place` another in its slot.

        Raises:
            ValueError: the victim is in flight or leased, or the other is there already.
        """
        lender, evicted = victim
        slot = self.cached[lender][evicted]
        busy = slot in self._in_flight or slot in self._leased
        if busy or expert in self.cached[layer]:
            raise ValueError(
                f"layer {layer}: expert {expert} is there already, or expert {evicted} of layer "
                f"{lender} is in flight or leased"
            )
        del self.cached[lender][evicted]
        self.changed[lender].add(evicted)
        self.cached[layer][expert] = slot
        self.changed[layer].add(expert)
        self._in_flight.add(slot)
        return slot

    def withdraw(self, layer: int, expert: int) -> None:
        """Free the slot of an expert that is in flight and will not arrive.

        Raises:
            ValueError: it is not in flight, or leased.
        """
        slot = self.cached[layer][expert]
        if slot not in self._in_flight or slot in self._leased:
            raise ValueError(f"layer {layer}: expert {expert} is not in flight, or leased")
        self._in_flight.discard(slot)
        del self.cached[layer][expert]
        self.changed[layer].add(expert)
        self._free.append(slot)

    def arrive(self, layer: int, expert: int) -> None:
        """The expert's weights are in its slot."""
        slot = self.cached[layer][expert]
        self._in_flight.discard(slot)

    def in_flight(self, layer: int, expert: int) -> bool:
        slot = self.cached[layer].get(expert)
        return slot in self._in_flight

    def lease(self, layer: int, experts: Collection[int]) -> None:
        """Hold the cached ones among `experts` until `release`."""
        cached = self.cached[layer]
        self._leased.update([cached[expert] for expert in experts if expert in cached])

    def release(self) -> None:
        """End all leases: a pool serves one layer call at a time."""
        self._leased.clear()

    def stage(self) -> int:
        """The next staging slot, in turn; its last occupant must have been computed by then."""
        slot = self._staging[self._next_stage]
        self._next_stage = (self._next_stage + 1) % len(self._staging)
        return slot

    def lend(self, layer: int, expert: int) -> int | None:
        """Give an expert the staging slot whose turn is next; as `place`, until `give_back`.

        None where too few are left, or no slot can hold the layer's experts.

        Raises:
            ValueError: the expert is cached already.
        """
        if expert in self.cached[layer]:
            raise ValueError(f"layer {layer}: expert {expert} is cached already")
        if layer in self.on_cpu or len(self._staging) <= FEWEST_STAGING:
            return None
        slot = self._staging.pop(self._next_stage)
        self._next_stage %= len(self._staging)
        self._lent[layer] += 1
        self.cached[layer][expert] = slot
        self.changed[layer].add(expert)
        self._in_flight.add(slot)
        return slot

    def excess(self) -> NDArray[np.float64]:
        """[L] what each layer holds above its quota, as a share of that; negative below it."""
        held = np.fromiter(map(len, self.cached), np.float64, len(self.cached))
        return held / self._at_least_one - 1.0

    def stages(self, slot: int) -> bool:
        """Whether a slot is a staging slot now."""
        return slot in self._staging

    def debt(self, layer: int) -> int:
        """Staging slots that a layer has to give back."""
        return self._lent[layer]

    def can_give_back(self, layer: int) -> bool:
        """Whether a debtor can do without a slot that is free now."""
        if not self._lent[layer] or not self._free:
            return False
        return self.shared or len(self.cached[layer]) < self.quotas[layer] + self._lent[layer]

    def give_back(self, layer: int) -> None:
        """Make a free slot a staging slot again, the last in turn, for one that a layer owes.

        Only between calls: during one, demand loads take turns.

        Raises:
            ValueError: not `can_give_back`.
        """
        if not self.can_give_back(layer):
            raise ValueError(f"layer {layer}: owes no staging slot, or has none to give back")
        self._lent[layer] -= 1
        self._staging.insert(self._next_stage, self._free.pop())
        self._next_stage = (self._next_stage + 1) % len(self._staging)

    def adopt(self, layer: int, expert: int, slot: int, victim: int) -> None:
        """Keep an expert in its staging slot; its victim's slot is for staging from now on.

        Nothing is moved. The expert must have arrived there, and the slot must not have been given
        out again since.

        Args:
            slot: where the expert lies.
            victim: an expert of the same layer, which is evicted.

        Raises:
            ValueError: the expert is cached already, or the victim is in flight or leased.
        """
        if expert in self.cached[layer]:
            raise ValueError(f"layer {layer}: expert {expert} is cached already")
        place = self._staging.index(slot)
        self.evict(layer, victim)
        self._staging[place] = self._free.pop()
        self.cached[layer][expert] = slot
        self.changed[layer].add(expert)

    def keeping(self, held: Mapping[int, ExpertRef]) -> SlotPool:
        """A pool of the same size that keeps only experts which lie in their slots for certain.

        Args:
            held: slot -> expert whose bytes are all there.
        """
        pool = SlotPool(self.quotas, self.staging, self.shared, self.on_cpu)
        taken = set()
        for layer, cached in enumerate(self.cached):
            for expert, slot in cached.items():
                if held.get(slot) == (layer, expert):
                    pool.cached[layer][expert] = slot
                    taken.add(slot)
        for layer, cached in enumerate(pool.cached):  # what was lent is staging again
            while cached and pool._holds_too_much(layer):
                taken.remove(cached.popitem()[1])
        left = [slot for slot in range(self.slots) if slot not in taken]
        pool._staging = left[: self.staging]
        pool._free = left[self.staging :]
        return pool

    def check_integrity(self) -> None:
        """Check that each slot is free or holds exactly one expert, within every quota.

        Raises:
            AssertionError: naming what is wrong.
        """
        held = [slot for cached in self.cached for slot in cached.values()]
        lent = sum(self._lent)
        assert len(self._staging) + lent == self.staging, "a staging slot is lost"
        every = sorted(held + self._free + self._staging)
        assert every == list(range(self.slots)), "a slot is lost or held twice"
        assert not any(self.cached[layer] for layer in self.on_cpu), "a slot of a layer on the CPU"
        if not self.shared:
            for cached, quota, debt in zip(self.cached, self.quotas, self._lent, strict=True):
                assert len(cached) <= quota + debt, "over quota"
        busy = self._in_flight | self._leased
        assert busy <= set(held), "a free slot is in flight or leased"

    def _holds_too_much(self, layer: int) -> bool:
        """Whether a layer, or all of them, hold more than their share."""
        held = sum(map(len, self.cached))
        over = not self.shared and len(self.cached[layer]) > self.quotas[layer]
        return over or held > sum(self.quotas)
