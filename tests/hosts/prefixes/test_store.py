"""The store against a twin that is a list of sequences, within its budget and after interrupts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from interrupts import ended, operations
from written_cache import BYTES, Model, check, check_entries, extend, keep

from hybrimoe_plugin.decode.layer_buffers import LayerBuffers
from hybrimoe_plugin.hosts.transformers.prefixes import entry as entries
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore

PLENTY = 2**30
WINDOW = 4


def common(one: list[int], other: list[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


class Twin:
    """What an endless store keeps, as plain lists."""

    def __init__(self, in_part: bool) -> None:
        self.sequences: list[list[int]] = []
        self._in_part = in_part

    def begin(self, prompt: list[int], running: list[list[int]]) -> int:
        counts = [self._shared(held, prompt) for held in self.sequences + running]
        best = max(counts, default=0)
        used = [held for held in self.sequences if self._shared(held, prompt) == best]
        if best and used and len(used[-1]) == best:
            self.sequences.remove(used[-1])
        return best

    def end(self, held: list[int]) -> None:
        if any(self._covers(other, held) for other in self.sequences):
            return
        self.sequences = [other for other in self.sequences if not self._covers(held, other)]
        self.sequences.append(held)

    def _shared(self, held: list[int], prompt: list[int]) -> int:
        count = common(held, prompt[:-1])
        return count if self._in_part or count == len(held) else 0

    def _covers(self, new: list[int], old: list[int]) -> bool:
        return new == old or (self._in_part and new[: len(old)] == old)


def texts(rng: random.Random, held: list[list[int]]) -> list[int]:
    """A new sequence, or one that begins as another does."""
    begun = rng.choice(held) if held and rng.random() < 0.8 else []
    cut = len(begun) if rng.random() < 0.5 else rng.randrange(len(begun) + 1)
    return begun[:cut] + [rng.randrange(3) for _ in range(rng.randrange(1, 9))]


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("seed", range(6))
def test_a_store_shares_what_its_twin_does(window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    store, twin = PrefixStore(Model(window), PLENTY), Twin(window is None)
    running: list[tuple[list[int], Any]] = []
    for _ in range(60):
        prompt = texts(rng, twin.sequences + [ids for ids, _ in running])
        others = running if rng.random() < 0.7 else []
        cache, shared = store.begin(prompt, others)
        wanted = twin.begin(prompt, [ids for ids, _ in others])
        assert shared == wanted < len(prompt)
        check(cache.layers, prompt[:shared])
        running.append((prompt, extend(cache, prompt[shared:], rng.choice((1, 3, 100)))))
        if len(running) > 3:
            ids, done = running.pop(rng.randrange(4))
            store.end([*ids, 1], done)  # the answer's last token has no entry
            twin.end(ids)
        for ids, cache in running:
            check(cache.layers, ids)
        check_entries(store)
        assert sorted(e.ids.tolist() for e in store._entries) == sorted(twin.sequences)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("seed", range(8))
def test_interrupts_leave_right_entries(window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    store = PrefixStore(Model(window), 60 * BYTES)
    held: list[list[int]] = []

    def step() -> None:
        prompt = texts(rng, held)
        held.append(prompt)
        keep(store, prompt)

    count = operations(step)
    for _ in range(40):
        ended(step, rng.randrange(1, 2 * count), KeyboardInterrupt())
        check_entries(store)
        assert not store._lock.locked()
    step()
    check_entries(store)


def test_the_last_used_stay_within_the_limit() -> None:
    store = PrefixStore(Model(), 100 * BYTES)
    first, second, third = [1] * 40, [2] * 40, [3] * 40
    keep(store, first)
    keep(store, second)
    assert (store.sequences, store.nbytes) == (2, 80 * BYTES)
    _, shared = store.begin([*first[:15], 9, 9])  # a copy, which is a use
    assert shared == 15
    keep(store, third)
    assert [entry.ids[0] for entry in store._entries] == [1, 3]

    keep(store, [4] * 101)  # alone larger than all
    assert [entry.ids[0] for entry in store._entries] == [1, 3]
    keep(store, [5] * 100)
    assert [entry.ids[0] for entry in store._entries] == [5]
    assert (store.lookups, store.hits, store.hit_tokens) == (6, 1, 15)

    store.clear()
    assert (store.sequences, store.nbytes) == (0, 0)


def test_what_would_not_fit_twice_is_cut() -> None:
    store = PrefixStore(Model(), 100 * BYTES)
    keep(store, [1] * 60)
    cache, shared = store.begin([1] * 50 + [2])
    assert (shared, store.sequences) == (50, 0)
    check(cache.layers, [1] * 50)
    check(extend(cache, [2, 3]).layers, [1] * 50 + [2, 3])


def test_nothing_is_kept_without_a_budget_but_running_ones_are_shared() -> None:
    store = PrefixStore(Model(), 0)
    cache = extend(store.begin([1] * 9)[0], [1] * 9)
    assert store.begin([1] * 9 + [2], [([1] * 9, cache)])[1] == 9
    store.end([1] * 9, cache)
    assert store.sequences == 0


def test_spare_capacity_is_given_back() -> None:
    store = PrefixStore(Model(WINDOW), PLENTY)
    keep(store, [1] * 300 + [2] * 2, piece=300)
    (entry,) = store._entries
    growing, sliding = entry.layers
    assert growing.keys.untyped_storage().nbytes() == 302 * BYTES // 4
    assert sliding.keys.untyped_storage().nbytes() == (WINDOW - 1) * BYTES // 4
    assert entry.nbytes == BYTES // 2 * (302 + WINDOW - 1)


def test_interrupted_passes_leave_what_all_layers_hold() -> None:
    for window, kept in ((None, 1), (WINDOW, 0)):
        store = PrefixStore(Model(window), PLENTY)
        cache = extend(store.begin([1] * 9)[0], [1] * 9)
        more = torch.ones(1, 1, 3, 8)
        cache.layers[0].update(more, more + 0.5)
        store.end([1] * 12, cache)
        assert store.sequences == kept
        check_entries(store)


def test_batches_and_unfilled_caches_are_not_kept() -> None:
    store = PrefixStore(Model(), PLENTY)
    cache, _ = store.begin([1, 2])
    store.end([1, 2], cache)
    cache.layers[0].update(torch.ones(2, 1, 3, 8), torch.ones(2, 1, 3, 8))
    cache.layers[1].update(torch.ones(2, 1, 3, 8), torch.ones(2, 1, 3, 8))
    store.end([1, 2, 3], cache)
    assert store.sequences == 0


def test_what_lies_in_a_graphs_buffers_is_copied() -> None:
    """They are the next sequence's, whose entries come to lie over these."""
    store = PrefixStore(Model(), PLENTY)
    buffers = LayerBuffers(0)
    first, second = [1] * 200, [2] * 190
    cache = extend(store.begin(first)[0], first)
    buffers.take(cache.layers[0])
    other, shared = store.begin([*first[:150], 7], [(first, cache)])
    assert shared == 150
    store.end(first, cache)
    nbytes = store.nbytes
    check_entries(store)

    running = extend(store.begin(second)[0], second)
    buffers.take(running.layers[0])
    check_entries(store)
    check(other.layers, first[:150])
    assert store.nbytes == nbytes == 200 * BYTES

    begun, shared = store.begin([*first, 5])
    assert shared == 200
    buffers.take(begun.layers[0])
    check(begun.layers, first)
    check(running.layers, second)
    store.end([*first, 5], extend(begun, [5]))
    check_entries(store)


def test_entries_of_a_device_go_there_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = PrefixStore(Model(), PLENTY)
    monkeypatch.setattr(entries, "device_of", lambda layer: torch.device("cpu:0"))
    keep(store, [1] * 9)
    monkeypatch.setattr(
        "hybrimoe_plugin.hosts.transformers.prefixes.store.copy_of",
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()),
    )
    with pytest.raises(torch.OutOfMemoryError):
        store.begin([1] * 9 + [2])
    check_entries(store)
    monkeypatch.undo()
    cache, shared = store.begin([1] * 9 + [2])
    assert (shared, store.sequences) == (9, 0)
    check(extend(cache, [2]).layers, [1] * 9 + [2])
