"""The parts of a chain: its edges, and what it survives."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from at_once import in_threads
from chained import answer, links_of, plain, proven
from graphed import Loader, cuda_layers_of
from interrupts import ended, operations
from late_device import LateCapture
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
