"""Chains of a device whose memory runs out: the cache shrinks, and its slots move."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from graphed import Loader, cuda_layers_of, greedy
from replayed import Replayed

from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.engine import engine as engine_module


def links_of(model: Any) -> list[Any]:
    return [layer._link for layer in cuda_layers_of(model)]


def proven(model: Any) -> bool:
    return all(layer.chain is not None and layer.chain.proven for layer in cuda_layers_of(model))


def answer(model: Any) -> list[int]:
    return greedy(model, tiny.tokens(20), 12)


def test_memory_that_runs_out_is_given_back(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots move: what was captured is captured anew."""
    model = load_captured("mixtral", Replayed(), cache_ratio=0.6)
    right = answer(tiny.model("mixtral"))
    assert answer(model) == right
    assert proven(model)
    (engine,) = model.hybrimoe.engines
    before = links_of(model)[0].memory
    compute = SlotAccelerator.compute
    once: list[int] = []

    def failing(self: Any, *args: Any) -> Any:
        if not once:
            once.append(1)
            raise torch.OutOfMemoryError("out of memory")
        return compute(self, *args)

    monkeypatch.setattr(SlotAccelerator, "compute", failing)
    assert answer(model) == right
    assert once and sum(engine.controller.pool.quotas) < 0.6 * 16
    assert answer(model) == right
    assert proven(model)
    assert links_of(model)[0].memory is not before


def test_a_capture_reads_no_slots_that_are_gone(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row still names them when a layer is captured anew for fewer slots."""
    monkeypatch.setattr(engine_module, "SHRINK_TO", 0.25)
    model = load_captured("mixtral", Replayed(), cache_ratio=0.9)
    right = answer(tiny.model("mixtral"))
    assert answer(model) == right
    assert proven(model)
    (engine,) = model.hybrimoe.engines
    engine._shrink(torch.OutOfMemoryError("out of memory"))
    assert links_of(model)[0].table.rows.max() >= engine.accelerator.slots
    assert answer(model) == right
    assert proven(model)
