"""Which layers an accelerator computes: near the best, never behind the CPU alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.placement.choose import DEVICE_RING, choose
from lever_ext.placement.measure import Measured
from lever_ext.placement.split import LayerCosts, Place, Rings, best_of, choose_places, pass_us
from tests.lever.placement.helpers import COPIED, CPU, STAYS, budget_for

COSTS = st.builds(
    LayerCosts,
    read_us=st.sampled_from([0.0, 100.0, 1000.0]),
    copy_us=st.sampled_from([10.0, 80.0, 400.0, 3000.0]),
    cpu_us=st.sampled_from([20.0, 90.0, 500.0]),
    device_us=st.sampled_from([5.0, 60.0, 700.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(COSTS, min_size=1, max_size=6),
    hop=st.sampled_from([0.0, 30.0]),
    stays=st.integers(0, 2),
)
def test_what_is_chosen_is_near_the_best_and_never_behind_the_cpu(
    layers: list[LayerCosts], hop: float, stays: int
) -> None:
    stays, rings = min(stays, len(layers)), Rings(3, 3, hop)
    kept = [STAYS] * stays
    found = choose_places(layers, stays, rings)
    rest = len(layers) - stays
    best = min(
        pass_us(layers, [*kept, *places], rings)
        for places in itertools.product((CPU, COPIED), repeat=rest)
    )
    alone = pass_us(layers, [CPU] * len(layers), rings)
    assert found.pass_us <= pass_us(layers, [*kept, *[CPU] * rest], rings) + 1e-6
    assert (
        found.pass_us == pytest.approx(pass_us(layers, found.places, rings))
        and found.pass_us <= 1.25 * best
    )
    chosen = best_of([found], alone)
    assert chosen is None or chosen.pass_us < alone


def test_a_pass_is_its_slowest_queue() -> None:
    rings = Rings(3, 3, 7.0)

    def us(cost: LayerCosts, place: Place, count: int = 10) -> float:
        return pass_us([cost] * count, [place] * count, rings)

    assert us(LayerCosts(100, 10, 20, 5), CPU) == pytest.approx(1000)  # reads hide computing
    assert us(LayerCosts(100, 10, 20, 5), COPIED) == pytest.approx(1000)
    assert us(LayerCosts(10, 10, 100, 5), CPU) == pytest.approx(1000)
    assert us(LayerCosts(10, 100, 100, 5), COPIED) == pytest.approx(
        1000, rel=0.03
    )  # the link is busy all the time
    assert us(LayerCosts(10, 100, 100, 5), STAYS) == pytest.approx(10 * 5 + 2 * 7)
    mixed = pass_us([LayerCosts(0, 9, 50, 5)] * 4, [CPU, STAYS, STAYS, CPU], rings)
    assert mixed == pytest.approx(2 * 50 + 2 * 5 + 2 * 7)


def test_the_accelerator_is_filled_with_layers_and_never_overfilled(packs: dict[str, Path]) -> None:
    pack = FlashPack.open(packs["llama"])
    layers, budget = pack.blocks("layer"), budget_for(packs["llama"], (CPU,), 0.0)
    quick = Measured((LayerCosts(1000, 100, 300, 30),) * 4, 1.0, head_cpu_us=500, head_device_us=20)
    slow = Measured(
        (LayerCosts(1000, 100, 300, 3000),) * 4, 1.0, head_cpu_us=20, head_device_us=500
    )
    last = 0
    for free in range(0, 3 * sum(block.nbytes for block in layers), 4096):
        found = choose(pack, budget, quick, free, 8192, None)
        assert choose(pack, budget, slow, free, 8192, None) is None
        if found is None:
            continue
        copied = any(place is COPIED for place in found.places)
        used = sum(block.nbytes for block in layers[: found.stays]) + (8192 if found.head else 0)
        assert used + (DEVICE_RING * block_memory(layers) if copied else 0) <= free
        assert found.stays >= last and found.pass_us < found.cpu_us
        last = found.stays
        assert "live there" in found.line("cuda:0")
    assert last == 4 and found is not None and found.head
    pack.close()
