"""The parts of a chain: its table of slots, its edges, and what it survives."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from at_once import in_threads
from graphed import Loader, cuda_layers_of, greedy
from interrupts import ended, operations
from late_device import LateCapture, late_device
from replayed import Replayed

from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.decode.chain import stamp
from hybrimoe_plugin.decode.chain.chain import LayerCall
from hybrimoe_plugin.decode.chain.slot_table import NOWHERE
from hybrimoe_plugin.decode.chain.stamp import Stamp
from hybrimoe_plugin.device.streams import AHEAD, COMPUTE, LINK
from hybrimoe_plugin.errors import BackendError

TIMES = int(os.environ.get("HYBRIMOE_LONG", 6))
"""Interrupts, and as many injected errors."""


def links_of(model: Any) -> list[Any]:
    return [layer._link for layer in cuda_layers_of(model)]


def proven(model: Any) -> bool:
    return all(layer.chain is not None and layer.chain.proven for layer in cuda_layers_of(model))


def answer(model: Any, steps: int = 12) -> list[int]:
    return greedy(model, tiny.tokens(20), steps)


def plain(steps: int = 12) -> list[int]:
    return greedy(tiny.model("mixtral"), tiny.tokens(20), steps)


@pytest.fixture
def late(load_captured: Loader, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model on a late device whose chain has proved right and always runs ahead."""
    with late_device(monkeypatch, 3) as capture:
        model = load_captured("mixtral", capture, cache_ratio=0.5)
        for link in links_of(model):
            link.sure = 0.0
        answer(model)
        assert proven(model)
        yield model, capture


class UnmadeCopies:
    """A row on a device that makes no copy yet; keeps what each copy will read."""

    def __init__(self) -> None:
        self.sources: list[torch.Tensor] = []

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.sources.append(source)


def test_a_change_on_the_host_leaves_the_copy_before_it(late: tuple[Any, LateCapture]) -> None:
    model, capture = late
    (engine,) = model.hybrimoe.engines
    table, pool = links_of(model)[0].table, engine.controller.pool
    capture._streams.synchronize()
    table.update(0)
    table.push(0)
    copies = UnmadeCopies()
    table._copies[0] = copies, table._copies[0][1]
    one, other, last, *_ = pool.cached[0]
    for expert in (one, other):
        pool.evict(0, expert)
        table.update(0)
        table.push(0)
    table.show(0, [last], {})
    table.push(0)
    first, second, third = copies.sources
    assert first[one] == second[one] == second[other] == third[last] == NOWHERE
    assert first[other] != NOWHERE, "graphs that are launched already read it there"
    assert second[last] != NOWHERE


def test_what_is_shown_for_a_call_passes_with_it(late: tuple[Any, LateCapture]) -> None:
    model, capture = late
    (engine,) = model.hybrimoe.engines
    table, pool = links_of(model)[0].table, engine.controller.pool
    capture._streams.synchronize()
    table.update(0)
    before = table._shown[0].copy()
    cached, hidden, *_ = pool.cached[0]
    missing = next(e for e in range(len(before)) if e not in pool.cached[0])
    staged = pool.stage()
    table.show(0, [cached, hidden, missing], {cached: int(before[cached]), missing: staged})
    assert table._shown[0][[cached, hidden, missing]].tolist() == [before[cached], NOWHERE, staged]
    assert table.present[0].isdisjoint({hidden, missing})
    table.update(0)
    assert table._shown[0].tolist() == before.tolist()
    assert table.present[0] == set(pool.cached[0])


def test_what_was_loaded_anew_is_waited_for(late: tuple[Any, LateCapture]) -> None:
    """Also where it lies in the slot that it had before."""
    model, capture = late
    (engine,) = model.hybrimoe.engines
    table, pool = links_of(model)[0].table, engine.controller.pool
    capture._streams.synchronize()
    table.update(0)
    one, other, *_ = pool.cached[0]
    assert table.coming(0, pool.cached[0]) == []
    slot = pool.cached[0][one]
    pool.evict(0, one)
    assert pool.place(0, one) == slot
    assert table.coming(0, {one: slot, other: pool.cached[0][other]}) == [slot]
    pool.arrive(0, one)


def test_an_expert_is_in_its_row_once_it_has_arrived(late: tuple[Any, LateCapture]) -> None:
    model, capture = late
    (engine,) = model.hybrimoe.engines
    link = links_of(model)[0]
    table, pool = link.table, engine.controller.pool
    capture._streams.synchronize()
    table.update(0)
    table.push(0)
    (victim, slot), *_ = pool.cached[0].items()
    assert victim in table.present[0]
    assert table.rows[0, victim] == slot
    newcomer = next(e for e in range(engine.layers[0].spec.experts) if e not in pool.cached[0])

    pool.evict(0, victim)
    assert pool.place(0, newcomer) == slot
    engine.accelerator.onload(slot, engine.layers[0], newcomer, ahead=True)
    table.update(0)
    table.push(0)
    assert not table.present[0] & {victim, newcomer}
    assert table.rows[0, victim] == table.rows[0, newcomer] == NOWHERE
    table.update(0)
    table.push(0)
    assert newcomer not in table.present[0], "still on its way"
    capture._streams.synchronize()
    table.update(0)
    table.push(0)
    assert newcomer in table.present[0]
    assert table.rows[0, newcomer] == slot
    # And the same slot back, which has been written twice since.
    pool.arrive(0, newcomer)
    pool.evict(0, newcomer)
    assert pool.place(0, victim) == slot
    pool.arrive(0, victim)
    pool.evict(0, victim)
    assert pool.place(0, newcomer) == slot
    engine.accelerator.onload(slot, engine.layers[0], newcomer, ahead=True)
    table.update(0)
    table.push(0)
    assert newcomer not in table.present[0]
    assert table.rows[0, newcomer] == NOWHERE


def test_a_row_waits_where_an_expert_has_no_slot(late: tuple[Any, LateCapture]) -> None:
    model, capture = late
    (engine,) = model.hybrimoe.engines
    link = links_of(model)[0]
    table, pool = link.table, engine.controller.pool
    capture._streams.synchronize()
    table.update(0)
    table.push(0)
    assert not table.update(0), "nothing to send"
    victim, *others = pool.cached[0]
    pool.evict(0, victim)
    assert not link.would_hit([others[0], victim])
    assert victim in table.present[0], "as the device has it"
    assert link.would_hit(others[:2])
    assert victim not in table.present[0]
    assert table.update(0), "not sent yet"


def test_a_slot_is_not_written_before_graphs_that_may_read_it(
    late: tuple[Any, LateCapture],
) -> None:
    model, capture = late
    (engine,) = model.hybrimoe.engines
    layer = cuda_layers_of(model)[0]
    streams = capture._streams
    streams.synchronize()
    slot = next(iter(engine.controller.pool.cached[0].values()))
    for queue, ahead in ((LINK, False), (AHEAD, True)):
        layer._link.launch(layer._graphs.graph_break)
        assert streams._queues[COMPUTE], "launched, not run"
        engine.accelerator.onload(slot, engine.layers[0], 0, ahead=ahead)
        while streams._queues[queue]:
            streams._advance(queue)
        assert not streams._queues[COMPUTE], "the copy has waited for the graphs"
    streams.synchronize()


def test_experts_without_a_slot_are_left_out(late: tuple[Any, LateCapture]) -> None:
    model, _ = late
    link = links_of(model)[0]
    row = link.table.rows[0]
    present = (row != NOWHERE).nonzero().flatten()
    missing = (row == NOWHERE).nonzero().flatten()
    hidden = torch.randn(1, link.engine.layers[0].spec.hidden)
    weights = torch.tensor([[0.5, 0.5]])
    assert link.compute(hidden, present[None, :2], weights).any()
    mixed = torch.stack((present[0], missing[0]))[None]
    alone = link.compute(hidden, present[None, :2], torch.tensor([[0.5, 0.0]]))
    assert torch.equal(link.compute(hidden, mixed, weights), alone)
    assert not link.compute(hidden, missing[None, :2], weights).any()


def test_graphs_share_memory_with_those_of_later_layers(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is computed after all begins anew: the layers behind have used its memory."""
    void = []
    compute = LayerCall.compute_missing
    monkeypatch.setattr(
        LayerCall,
        "compute_missing",
        lambda call: (void.append(call.whole), compute(call))[1],
    )
    model = load_captured("mixtral", Replayed(_numbered()), cache_ratio=0.5, prefetch="off")
    for link in links_of(model):
        link.sure = 0.0
    assert answer(model) == plain()
    assert proven(model) and any(void)


def _numbered() -> Callable[..., Callable[[], None]]:
    """Spoils memory of a layer's first piece behind its last one; three pieces a layer."""
    pieces: list[Any] = []

    def spoil(number: int, done: Any, replay: Callable[[], None]) -> Callable[[], None]:
        pieces.append(done)
        if number % 3:
            return replay
        first = pieces[number - 3]

        def scrambled() -> None:
            replay()
            for _, _, _, made in first:
                for _, tensor in made:
                    if tensor.is_floating_point():
                        tensor.fill_(float("nan"))

        return scrambled

    return spoil


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_next_answer_after_an_interrupt(
    error: type[BaseException], late: tuple[Any, LateCapture]
) -> None:
    model, _ = late
    right = plain()
    rng = random.Random(1)
    call = partial(answer, model)
    count = operations(call)
    reached = 0
    for _ in range(TIMES):
        reached += ended(call, rng.randint(count // 3, count), error("at any point"))
        assert answer(model) == right
        model.hybrimoe.check_integrity()
    assert reached > TIMES // 2
    assert proven(model)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["onload", "resident", "used_layer", "arrived", "compute"])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_the_next_answer_after_an_error(
    place: str,
    error: type[Exception],
    late: tuple[Any, LateCapture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = late
    right = plain()
    for at in (1, 7, 20):
        calls = itertools.count(1)
        own = getattr(SlotAccelerator, place)

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:  # noqa: B023 - called within this pass of the loop
                raise error("out of something")
            return own(self, *args, **kwargs)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(SlotAccelerator, place, failing)
            try:
                found = answer(model)
            except error:
                pass
            else:
                assert found == right
        assert answer(model) == right
        model.hybrimoe.check_integrity()


def test_threads_take_turns(load_captured: Loader) -> None:
    model = load_captured("mixtral", Replayed(), cache_ratio=0.5)
    right = plain()
    answer(model)
    found = in_threads([partial(answer, model) for _ in range(3)])
    assert found == [right] * 3


def test_a_mark_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is asked, which raises what it failed of; a lost graph is named."""
    monkeypatch.setattr(stamp, "LATE_S", 0.05)

    class Memory:
        device = torch.device("cpu")
        asked = 0

        def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(tensor)

        def synchronize(self) -> None:
            self.asked += 1

    memory = Memory()
    mark = Stamp(memory)
    mark.expected += 1
    assert mark.seen[0] != mark.expected
    with pytest.raises(BackendError, match="has not come to its end: its mark is 0, not 1"):
        mark.wait()
    assert memory.asked == 1
    mark.recover()
    mark.wait()
