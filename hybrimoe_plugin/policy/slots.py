"""Which expert lies in which slot: bookkeeping only, the bytes belong to a backend.

A slot is free, in flight (its weights are crossing the link) or resident. A leased slot is in use
by a layer call. A slot that is leased or in flight cannot be evicted: `evictable` never lists it
and `evict` refuses it. Staging slots lie beside the cache and hold an expert only for the call that
demand-loads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from hybrimoe_plugin.core import ExpertRef


class SlotPool:
    """The slots of one link's near side, for all layers.

    Args:
        quotas: cached experts per layer position.
        shared: whether a layer may hold more than its quota at the cost of others; the sum of all
            quotas binds.
        staging: further slots for demand loads that the cache does not admit; at least 2, so that
            one can receive while the other computes.
    """

    def __init__(self, quotas: Sequence[int], staging: int = 2, shared: bool = False) -> None:
        if staging < 2 or any(quota < 0 for quota in quotas):
            raise ValueError(
                f"a pool needs 2 staging slots and quotas of at least 0, not {staging} and "
                f"{list(quotas)}"
            )
        self.quotas = list(quotas)
        self.staging = staging
        self.shared = shared
        self.cached: list[dict[int, int]] = [{} for _ in quotas]
        """Expert -> slot, for each layer; in flight ones included."""
        self._free = list(range(sum(quotas) - 1, -1, -1))
        self._staging = list(range(sum(quotas), sum(quotas) + staging))
        self._in_flight: set[int] = set()
        self._leased: set[int] = set()
        self._next_stage = 0

    @property
    def slots(self) -> int:
        """All slots, staging included."""
        return sum(self.quotas) + self.staging

    def slot_of(self, layer: int, expert: int) -> int | None:
        return self.cached[layer].get(expert)

    def has_room(self, layer: int) -> bool:
        return bool(self._free) and (self.shared or len(self.cached[layer]) < self.quotas[layer])

    def evictable(self, layer: int, keep: Collection[int] = ()) -> list[int]:
        """Experts of a layer whose slots may be taken now, `keep` excepted."""
        busy = self._in_flight | self._leased if self._leased else self._in_flight
        return [
            expert
            for expert, slot in self.cached[layer].items()
            if slot not in busy and expert not in keep
        ]

    def place(self, layer: int, expert: int) -> int:
        """Give an expert a cache slot; its weights are in flight until `arrive`."""
        if expert in self.cached[layer] or not self.has_room(layer):
            raise ValueError(f"layer {layer}: no room for expert {expert}, or it is there already")
        slot = self._free.pop()
        self.cached[layer][expert] = slot
        self._in_flight.add(slot)
        return slot

    def evict(self, layer: int, expert: int) -> ExpertRef:
        slot = self.cached[layer][expert]
        if slot in self._in_flight or slot in self._leased:
            raise ValueError(f"layer {layer}: expert {expert} is in flight or leased")
        del self.cached[layer][expert]
        self._free.append(slot)
        return ExpertRef(layer, expert)

    def withdraw(self, layer: int, expert: int) -> None:
        """Free the slot of an expert that is in flight and will not arrive."""
        slot = self.cached[layer][expert]
        if slot not in self._in_flight or slot in self._leased:
            raise ValueError(f"layer {layer}: expert {expert} is not in flight, or leased")
        self._in_flight.discard(slot)
        del self.cached[layer][expert]
        self._free.append(slot)

    def arrive(self, layer: int, expert: int) -> None:
        self._in_flight.discard(self.cached[layer][expert])

    def in_flight(self, layer: int, expert: int) -> bool:
        return self.cached[layer].get(expert) in self._in_flight

    def lease(self, layer: int, experts: Collection[int]) -> None:
        """Hold the cached ones among `experts` until `release`."""
        cached = self.cached[layer]
        self._leased.update(cached[expert] for expert in experts if expert in cached)

    def release(self) -> None:
        """End all leases: a pool serves one layer call at a time."""
        self._leased.clear()

    def stage(self) -> int:
        """The next staging slot, in turn; its last occupant must have been computed by then."""
        slot = self._staging[self._next_stage]
        self._next_stage = (self._next_stage + 1) % self.staging
        return slot

    def adopt(self, layer: int, expert: int, slot: int, victim: int) -> None:
        """Keep an expert in the staging slot where it lies; in exchange the slot of one of its
        layer is for staging.

        Nothing is moved. The expert must have arrived there, and the slot must not have been given
        out again since.
        """
        if expert in self.cached[layer]:
            raise ValueError(f"layer {layer}: expert {expert} is cached already")
        place = self._staging.index(slot)
        self.evict(layer, victim)
        self._staging[place] = self._free.pop()
        self.cached[layer][expert] = slot

    def keeping(self, held: Mapping[int, ExpertRef]) -> SlotPool:
        """A pool of the same size with those of this one's experts that lie in their slots for
        certain.

        Args:
            held: slot -> expert whose bytes are all there.
        """
        pool = SlotPool(self.quotas, self.staging, self.shared)
        for layer, cached in enumerate(self.cached):
            pool.cached[layer] = {
                e: slot for e, slot in cached.items() if held.get(slot) == (layer, e)
            }
        taken = {slot for layer in pool.cached for slot in layer.values()}
        left = [slot for slot in range(self.slots) if slot not in taken]
        pool._staging, pool._free = left[: self.staging], left[self.staging :]
        return pool

    def check_integrity(self) -> None:
        """Raise AssertionError unless each slot is free or holds exactly one expert, within every
        quota.
        """
        held = [slot for layer in self.cached for slot in layer.values()]
        assert sorted(held + self._free + self._staging) == list(range(self.slots)), (
            "a slot is lost or held twice"
        )
        within = (
            len(layer) <= quota for layer, quota in zip(self.cached, self.quotas, strict=True)
        )
        assert self.shared or all(within), "over quota"
        assert self._in_flight <= set(held) and self._leased <= set(held), (
            "a free slot is in flight or leased"
        )
