"""The table of slots that graphs read: what it says, and when it is sent."""

from __future__ import annotations

from typing import Any

import torch
from chained import links_of
from late_device import LateCapture

from hybrimoe_plugin.decode.chain.slot_table import NOWHERE


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
