"""Tiles that the host cuts against the plain way: sorted and cut by operations of the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import random_call, random_layer, reference
from torch.utils._python_dispatch import TorchDispatchMode

from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.kernels.tiles import SortedPairs, Tiles, cut_waves
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator

EXPERTS = 6


class Operations(TorchDispatchMode):
    """Notes what torch is asked to do on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def device_tiles(slot_ids: torch.Tensor, slots: Sequence[int], size: int) -> Tiles:
    """The plain twin: every step is an operation of the device."""
    count, pairs = len(slots), slot_ids.numel()
    places = torch.full((max(slots) + 2,), count)
    places[torch.tensor(slots)] = torch.arange(count)
    # -1, for a pair without a slot, reads the last entry: `count`.
    sorted_keys, order = places[slot_ids.flatten()].sort(stable=True)
    bounds = torch.searchsorted(sorted_keys, torch.arange(count + 1))
    begin, end = bounds[:-1], bounds[1:]
    last_tiles = ((end - begin + size - 1) // size).cumsum(0)
    tile = torch.arange(-(-pairs // size) + count)
    owner = torch.searchsorted(last_tiles, tile, right=True)
    owner.clamp_(max=count - 1)
    tiles_before = torch.where(owner > 0, last_tiles[owner - 1], 0)
    firsts = begin[owner] + (tile - tiles_before) * size
    ends = torch.minimum(firsts + size, end[owner])
    tile_slots = torch.where(tile < last_tiles[-1], torch.tensor(slots)[owner], -1)
    return Tiles(order, tile_slots, firsts, ends, size)


def pairs_by_slot(tiles: Tiles) -> list[tuple[int, list[int]]]:
    """(slot, its pairs) of each tile that is used, in order."""
    found = []
    for slot, first, end in zip(*(part.tolist() for part in tiles[1:4]), strict=True):
        if slot >= 0:
            found.append((slot, tiles.order[first:end].tolist()))
    return found


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, list[dict[int, int]], int]:
    """(ids [T, K], waves of disjoint experts in disjoint slots, tile size)."""
    top_k = draw(st.integers(1, EXPERTS))
    tokens = draw(st.integers(1, 40))
    few = draw(st.integers(top_k, EXPERTS))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(few)[:top_k] for _ in range(tokens)])
    slots = rng.permutation(20)
    waves: list[dict[int, int]] = [{} for _ in range(draw(st.integers(1, 3)))]
    for expert in rng.permutation(EXPERTS)[: draw(st.integers(1, EXPERTS))].tolist():
        waves[draw(st.integers(0, len(waves) - 1))][expert] = int(slots[expert])
    return ids, [wave for wave in waves if wave], draw(st.sampled_from((1, 2, 16, 64)))


@settings(max_examples=150, deadline=None)
@given(routings())
def test_the_same_tiles_as_on_the_device(given_: Any) -> None:
    """Experts without a token, without a slot, in one wave or several."""
    ids, waves, size = given_
    found = cut_waves(SortedPairs(ids, EXPERTS), waves, lambda *_: size, lambda sent: sent)
    assert len(found) == len(waves)
    for tiles, wave in zip(found, waves, strict=True):
        table = torch.full((EXPERTS,), -1)
        table[list(wave)] = torch.tensor(list(wave.values()))
        slot_ids = table[torch.from_numpy(ids)]
        plain = device_tiles(slot_ids, list(wave.values()), size)
        assert pairs_by_slot(tiles) == pairs_by_slot(plain)
        assert tiles.order[: ids.size].sort().values.equal(torch.arange(ids.size))
        assert tiles.tokens == size
        assert len(tiles.slots)
        assert len(tiles.slots) <= len(plain.slots) + 1
        for table in tiles[:4]:
            assert table.storage_offset() % 2 == 0, "a pointer that is no multiple of 16 bytes"


def test_one_copy_brings_the_tiles_of_all_waves() -> None:
    ids = np.random.default_rng(0).integers(0, 128, (2048, 8))
    waves = [{expert: 7 * expert % 130 for expert in range(16 * n, 16 * n + 16)} for n in range(8)]
    copies: list[torch.Tensor] = []

    def copy(numbers: torch.Tensor) -> torch.Tensor:
        copies.append(numbers)
        return numbers

    with Operations() as operations:
        tiles = cut_waves(SortedPairs(ids, 128), waves, lambda pairs, slots: 64, copy)
    assert len(copies) == 1
    assert not operations.names, "nothing but views of what was copied"
    assert sum(len(pairs) for wave in tiles for _, pairs in pairs_by_slot(wave)) == ids.size
    with Operations() as operations:
        device_tiles(torch.from_numpy(ids), range(128), 64)
    assert len(operations.names) > 20, "what counts operations counts"


@pytest.fixture
def triton_device() -> SlotAccelerator:
    pytest.importorskip("triton")
    device = make_accelerator("emulated", torch.device("cpu"), "triton")
    assert device is not None
    return device


@pytest.mark.parametrize("left_out", [0, 2])
def test_a_prompt_takes_two_launches_a_wave_and_one_sum(
    triton_device: SlotAccelerator, left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe_plugin.compute.gpu.kernels import prompt_ops

    weights = random_layer(("Q8_0",) * 3, 64, 64, EXPERTS)
    triton_device.allocate(EXPERTS, [weights])
    for expert in range(EXPERTS):
        triton_device.onload(EXPERTS - 1 - expert, weights, expert)
    hidden, ids, routing = random_call(20, EXPERTS, 64, 2, 0)
    mine = range(left_out, EXPERTS)
    waves = [{e: EXPERTS - 1 - e for e in mine if e % 2 == odd} for odd in (0, 1)]
    launches: list[str] = []
    arguments = (weights, waves, ids.numpy(), hidden, routing)
    with monkeypatch.context() as patch, Operations() as operations:
        # The interpreter would do a launch by operations of its own.
        patch.setattr(prompt_ops, "gate_up_prefill", Counted("gate up", launches))
        patch.setattr(prompt_ops, "down_prefill", Counted("down", launches))
        patch.setattr(prompt_ops, "tables", lambda *_: None)  # made once for a type
        call = triton_device.prompt_call(*arguments)
        assert call is not None
        prepared = list(operations.names)
        operations.names.clear()
        call.compute(0)
        call.compute(1)
        assert not operations.names
        call.output()
    assert launches == ["gate up", "down"] * 2
    made = "aten::new_zeros" if left_out else "aten::new_empty"
    assert prepared == ["aten::new_empty", made]
    assert operations.names == ["aten::sum.dim_IntList"]
    call = triton_device.prompt_call(*arguments)
    assert call is not None
    call.compute(1)
    call.compute(0)
    wanted = reference(weights, hidden, ids, routing, set(mine))
    torch.testing.assert_close(call.output().double(), wanted, rtol=1e-4, atol=1e-5)


class Counted:
    """A kernel that notes its launches and computes nothing."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert min(grid) > 0
        self.launches.append(self.name)
        return lambda *_, **__: None


def calls_prompt_kernels(device: SlotAccelerator, tokens: int, experts: int) -> bool:
    """Whether they take a call of tokens that choose two of so many experts evenly."""
    weights = random_layer(("Q8_0",) * 3, 64, 64, experts)
    device.allocate(1, [weights])
    hidden, _, routing = random_call(tokens, experts, 64, 2, 0)
    ids = np.arange(2 * tokens).reshape(tokens, 2) % experts
    wave = dict.fromkeys(range(min(experts, 2 * tokens)), 0)
    return device.prompt_call(weights, [wave], ids, hidden, routing) is not None


def test_a_few_rows_take_decode_kernels_while_experts_have_few_tokens(
    triton_device: SlotAccelerator,
) -> None:
    assert not calls_prompt_kernels(triton_device, 4, 8)
    assert not calls_prompt_kernels(triton_device, 32, 64)
    assert calls_prompt_kernels(triton_device, 4, 4), "two tokens each"
    assert calls_prompt_kernels(triton_device, 32, 32)
    assert calls_prompt_kernels(triton_device, 33, 66), "no few rows"


def test_int8_decode_kernels_take_more(triton_device: SlotAccelerator) -> None:
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    triton_device.kernels = TritonKernels(torch.device("cpu"), activations="int8")
    assert not calls_prompt_kernels(triton_device, 32, 22)
    assert calls_prompt_kernels(triton_device, 32, 16)
    assert calls_prompt_kernels(triton_device, 33, 66)


def test_torch_operations_know_no_prompts() -> None:
    weights = random_layer(("Q8_0",) * 3, 64, 64, EXPERTS)
    plain = make_accelerator("emulated", torch.device("cpu"), "torch")
    assert plain is not None
    hidden, ids, routing = random_call(20, EXPERTS, 64, 2, 0)
    assert plain.prompt_call(weights, [{0: 0}], ids.numpy(), hidden, routing) is None
