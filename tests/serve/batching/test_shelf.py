"""Sequences that lie side by side while their tokens are computed together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from schedulers import injected

from hybrimoe_plugin.compute.attention import shelf
from hybrimoe_plugin.hosts.transformers.prefixes.kinds import new_cache
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore
from hybrimoe_plugin.serve.batching.passes import Passes


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return injected(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture
def shelves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The shelves that passes make, with room for two more tokens; None where one did not pay."""
    made = []

    def noted(caches: Any) -> Any:
        made.append(shelf.shelf_for(caches))
        return made[-1]

    monkeypatch.setattr(shelf, "SPARE", 2)
    monkeypatch.setattr("hybrimoe_plugin.serve.batching.passes.shelf_for", noted)
    yield made


class Beside:
    """A sequence that is computed among others, and once more alone."""

    def __init__(self, model: Any, length: int, seed: int) -> None:
        self._alone = Passes(model)
        self.ids = tiny.tokens(length, seed=seed)[0].tolist()
        self.cache, self._other = new_cache(model), new_cache(model)

    def begin(self, passes: Passes) -> None:
        self.take(passes.piece(self.ids, self.cache), self.ids)

    def take(self, logits: torch.Tensor, given: list[int]) -> None:
        wanted = self._alone.piece(given, self._other)
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)
        self.ids.append(int(wanted.argmax()) % 96)


def begun(passes: Passes, model: Any, *lengths: int) -> list[Beside]:
    """Sequences of so many tokens, whose prompts are computed."""
    made = [Beside(model, length, seed) for seed, length in enumerate(lengths)]
    for each in made:
        each.begin(passes)
    return made


def step(passes: Passes, sequences: list[Beside]) -> None:
    tokens = [each.ids[-1] for each in sequences]
    caches = [each.cache for each in sequences]
    logits = passes.step(tokens, caches, list(range(len(sequences))))
    for each, row in zip(sequences, logits, strict=True):
        each.take(row, each.ids[-1:])


def test_they_join_leave_and_outgrow_it(model: Any, shelves: list[Any]) -> None:
    passes = Passes(model)
    a, b, c, d, e = begun(passes, model, 30, 21, 28, 25, 33)
    for rows in ([a, b], [b, a, c], [c, b], [b, d, c, e, a], [e, a], [a], [a, e, b, d, c]):
        for _ in range(3):
            step(passes, rows)
    assert len(shelves) > 4 and None not in shelves


def test_one_that_is_kept_has_memory_of_its_own(model: Any, shelves: list[Any]) -> None:
    passes, store = Passes(model), PrefixStore(model, 1 << 20)
    crowd = begun(passes, model, 30, 30, 30)
    step(passes, crowd)
    kept, *others = crowd
    passes.settle(kept.cache)
    store.end(kept.ids[:-1], kept.cache)
    for layer, (keys, _) in zip(kept.cache.layers, shelves[0].buffers, strict=True):
        assert layer.keys.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()
    step(passes, others)  # in its slot, too
    kept.cache, shared = store.begin(kept.ids)
    assert shared == len(kept.ids) - 1
    step(passes, [*others, kept])


def test_it_is_given_up_with_the_last_one(model: Any, shelves: list[Any]) -> None:
    passes = Passes(model)
    crowd = begun(passes, model, 20, 20)
    step(passes, crowd)
    for each in crowd:
        passes.settle(each.cache)
    assert shelves[0].is_empty and passes._shelf is None


def test_uneven_ones_go_row_by_row(model: Any, shelves: list[Any]) -> None:
    passes = Passes(model)
    step(passes, begun(passes, model, 5, 60, 7))
    assert shelves == [None]


def test_large_ones_go_row_by_row(
    model: Any, shelves: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "MOST_BYTES", 1000)
    passes = Passes(model)
    step(passes, begun(passes, model, 20, 20))
    assert shelves == [None]


def test_a_pass_that_fails_harms_no_other(
    model: Any, shelves: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(model)
    crowd = begun(passes, model, 20, 20, 20, 20)
    for _ in range(2):
        step(passes, crowd)
    with monkeypatch.context() as patch:
        patch.setattr(shelf.Places, "append", _fails)
        with pytest.raises(KeyboardInterrupt):
            step(passes, crowd[:2])
    step(passes, crowd[2:])


def _fails(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_what_one_leaves_behind_is_seen_by_no_other(model: Any, shelves: list[Any]) -> None:
    passes = Passes(model)
    first, second, short = begun(passes, model, 30, 30, 20)
    step(passes, [first, second])
    for layer in second.cache.layers:
        layer.keys[:, :, 25:] = layer.values[:, :, 25:] = torch.nan
    passes.forget(second.cache)
    step(passes, [first, short])
    assert len(shelves) == 1


def test_one_alone_and_forgotten_ones_keep_no_shelf(model: Any, shelves: list[Any]) -> None:
    passes = Passes(model)
    crowd = begun(passes, model, 20, 20, 20)
    step(passes, crowd)
    passes.forget(crowd[0].cache)
    passes.forget(crowd[1].cache)
    assert passes._shelf is not None
    step(passes, crowd[2:])
    assert passes._shelf is None
    step(passes, crowd[2:])


def test_one_that_has_become_too_wide_is_replaced(model: Any, shelves: list[Any]) -> None:
    passes = Passes(model)
    crowd = begun(passes, model, 30, 40, 38, 39, 37, 36, 6, 5)
    step(passes, crowd[:6])
    step(passes, crowd[6:])
    wide, narrow = shelves
    assert narrow.capacity < wide.capacity
