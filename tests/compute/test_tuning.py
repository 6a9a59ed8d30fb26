"""Tile sizes: what fits a shape, what is tried, what is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import random_layer

from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import slot_layout
from hybrimoe_plugin.compute.gpu.kernels.tuning import (
    CACHE_BYTES,
    Tunable,
    Tuned,
    candidates,
    slot_groups,
    tune,
)
from hybrimoe_plugin.core import ExpertSpec

QWEN = slot_layout(
    ExpertSpec(2048, 768, 128, 8, "Q4_K", "Q4_K", "Q6_K", 884736, 884736, 1290240), planar=True
)


def nothing() -> None:
    """Device work that is never run."""


def test_first_guess_covers_a_row_in_one_tile_where_it_can() -> None:
    assert Blocks.of(QWEN, 8)[:4] == (
        2,
        32,
        1,
        16,
    )  # 2048 columns = 32 units; 768 = 12, 16 with 8 experts are 128
    mixtral = slot_layout(
        ExpertSpec(4096, 14336, 8, 2, "Q4_K", "Q4_K", "Q4_K", 1, 1, 1), planar=True
    )
    assert Blocks.of(mixtral, 2)[:4] == (2, 32, 1, 64)
    assert all(value & (value - 1) == 0 for value in Blocks.of(mixtral, 6)), (
        "tiles are powers of two"
    )


@pytest.mark.parametrize(
    ("pairs", "experts", "tokens"), [(9, 8, 16), (160, 8, 32), (4096, 64, 64), (8192, 64, 64)]
)
def test_prefill_tiles_follow_the_load(pairs: int, experts: int, tokens: int) -> None:
    assert Blocks.of(QWEN, 8).tile_tokens(pairs, experts) == tokens


def test_the_fastest_of_each_stage_is_taken() -> None:
    first = Blocks.of(QWEN, 8)
    tried: list[Blocks] = []

    def run(blocks: Blocks) -> tuple[Callable[[], object], Callable[[], object]]:
        if blocks.decode_warps == 2:
            raise RuntimeError("out of resources")
        tried.append(blocks)
        return nothing, nothing

    def timer(work: Callable[[], object]) -> float:
        timer.calls += 1  # type: ignore[attr-defined]
        blocks, down = tried[-1], timer.calls % 2 == 0  # type: ignore[attr-defined]
        return (
            abs(blocks.down_rows - 4) + blocks.down_warps
            if down
            else abs(blocks.gate_rows - 1) + blocks.decode_warps
        )

    timer.calls = 0  # type: ignore[attr-defined]
    best = tune(first, run, timer)
    assert len(tried) == len([item for item in candidates(first) if item.decode_warps != 2])
    assert (best.gate_rows, best.decode_warps, best.down_rows, best.down_warps) == (1, 4, 4, 4)
    assert (best.gate_units, best.down_units, best.tokens) == (
        first.gate_units,
        first.down_units,
        first.tokens,
    )


def test_sizes_are_kept_in_a_file_and_a_damaged_one_is_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernels" / "sizes.json"
    blocks = Blocks.of(QWEN, 8)._replace(gate_rows=16)
    Tuned(path).put(QWEN, 8, blocks)
    assert Tuned(path).get(QWEN, 8) == blocks
    assert Tuned(path).get(QWEN, 6) is None
    hostile = (
        "[0, 1, 1, 1]",
        "[1, 1, 1, 1, -4]",
        "[1, 1, 1, 3]",
        "[1e9, 1, 1, 1]",
        "[1073741824, 1, 1, 1]",
        '"abcd"',
    )
    for damage in (
        "{",
        "[1]",
        '{"a": [1, "x"]}',
        '{"a": 3}',
        '{"a": [1]}',
        *(f'{{"a": {one}}}' for one in hostile),
    ):
        path.write_text(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert Tuned(path).get(QWEN, 8) is None
        assert "measured again" in caplog.text


def test_triton_kernels_use_what_was_tuned(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    spec = random_layer(("Q8_0", "Q8_0", "Q8_0"), 64, 64).spec
    kernels = TritonKernels(torch.device("cpu"), tuned=tmp_path / "sizes.json")
    assert isinstance(kernels, Tunable)
    layout = kernels.layout(spec)
    buffer = torch.zeros(2, kernels.layout(spec).size, dtype=torch.uint8)
    times = iter(range(1000, 0, -1))  # each run is faster than the one before

    def timer(work: Callable[[], object]) -> float:
        timer.runs += 1  # type: ignore[attr-defined]
        return float(next(times))

    timer.runs = 0  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on the CPU")
    kernels.tune(layout, spec.top_k, buffer, timer)
    first, count = Blocks.of(layout, spec.top_k), timer.runs  # type: ignore[attr-defined]
    found = Tuned(tmp_path / "sizes.json").get(layout, spec.top_k)
    assert found is not None
    assert found.decode_warps == 8
    assert found.gate_rows == 4 * first.gate_rows
    kernels.tune(layout, spec.top_k, buffer, timer)
    assert timer.runs == count, "a shape is tuned once"  # type: ignore[attr-defined]
    assert (
        kernels._sizes(SlotCall(buffer, layout, (0,), *[torch.zeros(1, spec.top_k)] * 3)) == found
    )


def test_slots_take_turns_until_the_cache_has_forgotten_them() -> None:
    groups = slot_groups(3000, 8, QWEN)
    slots = [slot for group in groups for slot in group]
    assert {len(group) for group in groups} == {8}
    assert len(set(slots)) == len(slots)
    for stage_bytes in (QWEN.gate.size + QWEN.up.size, QWEN.down.size):
        assert len(slots) * stage_bytes >= 2 * CACHE_BYTES
    assert slot_groups(20, 8, QWEN) == [tuple(range(8)), tuple(range(8, 16))], (
        "as many as the buffer has"
    )


def test_tuning_computes_other_slots_from_run_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same eight experts again and again would lie in the device's cache, whatever the
    tiles.
    """
    pytest.importorskip("triton")
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    spec = random_layer(("Q8_0", "Q8_0", "Q8_0"), 64, 64).spec
    kernels = TritonKernels(torch.device("cpu"))
    seen: dict[str, list[tuple[int, ...]]] = {"gate": [], "down": []}

    def gate_up(call: SlotCall, blocks: Blocks) -> torch.Tensor:
        assert call.slot_ids.tolist() == [list(call.slots)]
        seen["gate"].append(call.slots)
        return torch.empty(0)

    monkeypatch.setattr(kernels, "_gate_up_decode", gate_up)
    monkeypatch.setattr(
        kernels, "_down_decode", lambda call, activations, blocks: seen["down"].append(call.slots)
    )

    def timer(work: Callable[[], object]) -> float:
        for _ in range(5):
            work()
        return 1.0

    slots = 5 * spec.top_k
    kernels.tune(kernels.layout(spec), spec.top_k, torch.zeros(slots, 8, dtype=torch.uint8), timer)
    for stage in seen.values():
        assert all(set(one).isdisjoint(other) for one, other in zip(stage, stage[1:], strict=False))
        assert {slot for group in stage for slot in group} == set(range(slots))
