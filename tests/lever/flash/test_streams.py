"""Layers of a pack in the order of execution, and the DRAM that they take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hybrimoe_plugin.errors import BudgetError, FlashError
from lever_ext.flash.dram_plan import plan_dram
from lever_ext.flash.format import ALIGNMENT
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.stream import LayerStream
from tests.lever.flash.toy import LAYERS, make


def test_change_and_truncation_while_running(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    pack = FlashPack.open(path)
    stream = LayerStream(pack, 0, 2)
    stream.acquire(0)
    stream.release(0)
    os.truncate(path, ALIGNMENT * 3)
    with pytest.raises(FlashError, match="changed|truncated"):
        for layer in range(1, LAYERS):
            stream.acquire(layer)
            stream.release(layer)
    pack.close()


def test_a_block_that_changes_under_its_old_time_is_found(tmp_path: Path) -> None:
    path, state = make(tmp_path)
    pack = FlashPack.open(path)
    stream = LayerStream(pack, 0, 2)
    for layer in range(LAYERS):
        stream.acquire(layer)
        stream.release(layer)
    stream.reset(0)
    before = path.stat()
    os.chmod(path, 0o600)  # not a change that matters
    for layer in range(LAYERS):
        _, tensors = stream.acquire(layer)
        assert torch.equal(
            tensors[f"layers.{layer}.linear.weight"], state[f"layers.{layer}.linear.weight"]
        )
        stream.release(layer)
    stream.reset(0)
    with path.open("r+b") as file:
        file.seek(pack.blocks("layer")[3].offset + 8)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FlashError, match="target.lever: block layer 3 is damaged"):
        for layer in range(LAYERS):
            stream.acquire(layer)
            stream.release(layer)
    pack.close()


def test_a_removed_pack_is_read_to_the_end(tmp_path: Path) -> None:
    path, state = make(tmp_path)
    pack = FlashPack.open(path)
    path.unlink()
    stream = LayerStream(pack, 1, 2)
    for layer in range(LAYERS):
        _, tensors = stream.acquire(layer)
        name = f"layers.{layer}.linear.weight"
        torch.testing.assert_close(tensors[name], state[name])
        stream.release(layer)
    pack.close()


@pytest.mark.parametrize(("resident", "ring"), [(0, 2), (2, 3), (5, 2), (LAYERS, 0)])
def test_stream_hands_out_every_layer_in_every_pass(
    tmp_path: Path, resident: int, ring: int
) -> None:
    path, state = make(tmp_path)
    pack = FlashPack.open(path)
    stream = LayerStream(pack, resident, ring)
    for _ in range(3):
        for layer in range(LAYERS):
            _, tensors = stream.acquire(layer)
            name = f"layers.{layer}.linear.weight"
            torch.testing.assert_close(tensors[name], state[name], rtol=0, atol=0)
            stream.release(layer)
    # A pass that is cut off in the middle must not upset the next one.
    for layer in range(4):
        stream.acquire(layer)
        if layer < 3:
            stream.release(layer)
    for layer in range(LAYERS):
        _, tensors = stream.acquire(layer)
        torch.testing.assert_close(
            tensors[f"layers.{layer}.linear.weight"], state[f"layers.{layer}.linear.weight"]
        )
        stream.release(layer)
    pack.close()


def test_budget_is_spent_on_first_layers_and_never_exceeded(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    pack = FlashPack.open(path)
    layer = pack.blocks("layer")[0].nbytes
    fixed = sum(block.nbytes for block in pack.blocks("resident"))
    with pytest.raises(BudgetError, match="dram_budget"):
        plan_dram(pack, fixed + 2 * layer - 1)
    assert plan_dram(pack, fixed + 2 * layer).layers == 0
    for budget in range(fixed + 2 * layer, fixed + LAYERS * layer, 3000):
        residency = plan_dram(pack, budget)
        assert residency.nbytes <= budget and residency.ring >= 2
    assert plan_dram(pack, fixed + LAYERS * layer) == plan_dram(pack, None)
    assert plan_dram(pack, None).ring == 0
    pack.close()
