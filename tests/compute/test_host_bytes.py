"""Registering pages of weights with CUDA, whose runtime is played by a fake."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.gpu import host_bytes
from hybrimoe_plugin.compute.gpu.host_bytes import RegisteredBytes, StagedBytes
from hybrimoe_plugin.device.streams import HostStreams

DEVICE = torch.device("cuda:0")


class FakeRuntime:
    """cudaHostRegister that refuses ranges which overlap `taken`, or everything, or flags."""

    def __init__(
        self,
        taken: tuple[int, int] | None = None,
        refuse: bool = False,
        refused_flags: tuple[int, ...] = (),
    ) -> None:
        self.taken = taken
        self.refuse = refuse
        self.refused_flags = refused_flags
        self.ranges: dict[int, int] = {}
        self.calls = 0

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:  # noqa: N802
        assert start % 4096 == size % 4096 == 0
        assert flags in (9, 1)
        self.calls += 1
        hit = self.taken is not None and start < self.taken[1] and self.taken[0] < start + size
        if self.refuse or hit or flags in self.refused_flags:
            return 1
        self.ranges[start] = start + size
        return 0

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        del self.ranges[start]
        return 0


def registered(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> RegisteredBytes:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host_bytes, "_clear_error", lambda device: None)
    return RegisteredBytes(DEVICE, StagedBytes(HostStreams(), ring=2, pinned=False, slow=True))


def test_pages_are_registered_once_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    host = registered(monkeypatch, runtime)
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    host.prepare([weights])
    known = dict(runtime.ranges)
    calls = runtime.calls
    host.prepare([weights])
    assert (runtime.ranges, runtime.calls) == (known, calls)
    assert not host.slow
    for matrix in weights.matrices():
        part = matrix.experts[3]
        source = host.source(part)
        assert source.data_ptr() == part.ctypes.data, "the one host copy is what the link reads"
        host.sent(None)
    host.release()
    assert not runtime.ranges


def test_what_cannot_be_registered_is_staged_with_a_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeRuntime(refuse=True)
    host = registered(monkeypatch, runtime)
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    with caplog.at_level(logging.WARNING):
        host.prepare([weights])
    assert "cannot be registered" in caplog.text
    assert "weights: memory" not in caplog.text
    assert host.slow, "a thread of its own makes the copies"
    calls = runtime.calls
    host.prepare([weights])
    assert runtime.calls == calls, "asked once"
    for expert in range(5):
        part = weights.up.experts[expert]
        source = host.source(part)
        assert source.data_ptr() != part.ctypes.data
        np.testing.assert_array_equal(source.numpy(), part)
        host.sent(None)


def test_a_page_that_another_device_has_costs_only_its_own_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two devices share a file: the page at their border is registered by the first."""
    weights = tiny_experts.layer(experts=16, intermediate=512, types=("Q8_0",) * 3)
    first = min(matrix.experts[0].ctypes.data for matrix in weights.matrices()) // 4096 * 4096
    runtime = FakeRuntime(taken=(first, first + 4096))
    host = registered(monkeypatch, runtime)
    host.prepare([weights])
    assert runtime.ranges
    parts = [part for matrix in weights.matrices() for part in matrix.experts]
    direct = []
    for part in parts:
        direct.append(host.source(part).data_ptr() == part.ctypes.data)
        host.sent(None)
    assert 0 < direct.count(False) <= 2
    assert not host.slow, "too few for a thread"


def test_memory_of_the_process_is_proposed_where_only_mappings_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tiny_experts.layer(experts=16, intermediate=512, types=("Q8_0",) * 3)
    starts = [
        matrix.stacked.ctypes.data for matrix in weights.matrices() if matrix.stacked is not None
    ]
    ends = [
        matrix.stacked.ctypes.data + matrix.stacked.size
        for matrix in weights.matrices()
        if matrix.stacked is not None
    ]
    runtime = FakeRuntime(taken=(min(starts) - 4096, max(ends) + 4096))
    host = registered(monkeypatch, runtime)
    with caplog.at_level(logging.WARNING):
        host.prepare([weights])
    assert "weights: memory" in caplog.text
    assert not runtime.ranges, "what was tried is given back"


def test_devices_that_do_not_know_read_only_pages_register_the_process_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = FakeRuntime(refused_flags=(9,))
    host = registered(monkeypatch, runtime)
    host.prepare([tiny_experts.layer(types=("Q8_0",) * 3)])
    assert runtime.ranges
    assert not host.slow
    host.release()
    assert not runtime.ranges
