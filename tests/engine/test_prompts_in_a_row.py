"""Prompts in a row on late queues: experts kept in staging slots, slots lent and returned hold the
right weights.
"""

from __future__ import annotations

import pytest
import torch
from engines import build, run
from fake_streams import LazyStreams
from kernel_cases import random_layer
from watched import WatchedKernels, watched_copy

from hybrimoe_plugin.compute.gpu import slot_writer
from hybrimoe_plugin.compute.gpu.host_bytes import StagedBytes
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.policy import slots
from hybrimoe_plugin.policy.slots import SlotPool

WEIGHTS = [random_layer(("Q8_0", "Q4_0", "F16"), 32, 32, 8, index=index) for index in range(3)]


def test_every_slot_holds_what_the_pool_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "FEWEST_STAGING", 2)  # this small cache has 4 staging slots
    lent = []
    lend = SlotPool.lend
    monkeypatch.setattr(SlotPool, "lend", lambda *given: lent.append(lend(*given)) or lent[-1])
    streams = LazyStreams(7)
    kept = []
    monkeypatch.setattr(slot_writer, "_copy_async", watched_copy(streams))
    adopt = SlotPool.adopt
    monkeypatch.setattr(
        SlotPool, "adopt", lambda pool, *given: (kept.append(given), adopt(pool, *given))
    )
    host = StagedBytes(streams, ring=4, pinned=False)
    device = SlotAccelerator(torch.device("cpu"), "fake", WatchedKernels(streams), streams, host)
    engine, routers = build(device, WEIGHTS, cache_ratio=0.5)
    for turn in range(60):
        # Rows of four prompts, of many tokens and few, then an answer of three tokens.
        tokens = 1 if turn % 7 > 3 else (12, 3, 40, 2)[turn % 7]
        run(engine, routers, tokens, turn, rtol=1e-4, atol=1e-5)
        engine.controller.pool.check_integrity()
    assert len(kept) > 20
    assert len([slot for slot in lent if slot is not None]) > 20
    device.close()
