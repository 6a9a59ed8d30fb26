"""What is said to CUDA: streams, events, one synchronisation, page registration; with torch.cuda
played by fakes.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.gpu import host_bytes
from hybrimoe_plugin.compute.gpu.host_bytes import RegisteredBytes, StagedBytes
from hybrimoe_plugin.device.cuda_graphs import CudaCapture, capture_for
from hybrimoe_plugin.device.streams import AHEAD, COMPUTE, LINK, REPACK, CudaStreams, HostStreams

DEVICE = torch.device("cuda:0")


class FakeEvent:
    def __init__(self) -> None:
        self.stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        FakeStream.stops += 1


class FakeStream:
    stops = 0

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.priority = priority
        self.waits: list[Any] = []
        self.followed: list[Any] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.followed.append(other)

    def wait_event(self, event: FakeEvent) -> None:
        self.waits.append(event.stream)

    def synchronize(self) -> None:
        FakeStream.stops += 1


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """torch.cuda's objects as fakes; gives the current stream."""
    stream, entered = FakeStream(), []

    @contextmanager
    def inside(chosen: FakeStream) -> Iterator[None]:
        entered.append(chosen)
        yield

    FakeStream.stops = 0
    stream.entered = entered
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


def test_queues_are_streams_and_demand_loads_go_first(current: FakeStream) -> None:
    streams = CudaStreams(DEVICE)
    link, ahead, repack = (streams._streams[name] for name in (LINK, AHEAD, REPACK))
    assert link.priority < ahead.priority
    done: list[str] = []
    streams.run(LINK, lambda: done.append("link"))
    streams.run(COMPUTE, lambda: done.append("compute"))
    assert done == ["link", "compute"]
    assert current.entered == [link], "compute runs on whatever stream is current"
    streams.wait(REPACK, streams.record(LINK))
    streams.wait(COMPUTE, streams.record(REPACK))
    streams.wait(AHEAD, streams.record(COMPUTE))
    assert (repack.waits, current.waits, ahead.waits) == ([link], [repack], [current])
    assert not streams.reached(streams.record(LINK))
    assert FakeStream.stops == 0
    streams.block(streams.record(LINK))
    assert FakeStream.stops == 1


def test_the_host_stops_once_for_all_tensors_and_only_in_wait(
    current: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = CudaStreams(DEVICE)
    copies: list[bool] = []

    def empty(shape: Any, dtype: torch.dtype, pin_memory: bool) -> Any:
        assert pin_memory
        return SimpleNamespace(
            copy_=lambda source, non_blocking: copies.append(non_blocking) or torch.zeros(shape)
        )

    monkeypatch.setattr(torch, "empty", empty)
    there = [SimpleNamespace(device=DEVICE, shape=(2, 3), dtype=torch.int64) for _ in range(5)]
    here = torch.ones(4)
    coming = streams.bring([*there, here])  # type: ignore[list-item]
    assert copies == [True] * 5
    assert FakeStream.stops == 0
    found = coming.wait()
    assert FakeStream.stops == 1
    assert coming.now() is None, "the event has not been reached"
    assert FakeStream.stops == 1
    assert found[-1] is here
    assert [tuple(tensor.shape) for tensor in found] == [(2, 3)] * 5 + [(4,)]


class FakeGraph:
    """Notes what is asked of it and on which stream; the third capture ends with an error."""

    log: list[str]
    current: FakeStream
    recording: set[str]
    """Pools that the allocator takes memory from, as it believes, for a capture."""

    def capture_begin(self, pool: str, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert pool not in self.recording, "already recording to mempool_id"
        self.pool = pool
        self.recording.add(pool)
        assert self.current.entered, "capturing needs a stream that is not the default one"
        assert not gc.isenabled()
        self.log.append("begin")

    def capture_end(self) -> None:
        self.log.append("end")
        if self.log.count("end") == 3:
            raise RuntimeError("capture was invalidated")
        self.recording.remove(self.pool)

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def graphs(current: FakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = iter(("pool", "second pool"))
    FakeGraph.log, FakeGraph.current, FakeGraph.recording = [], current, set()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.delattr(
        torch._C, "_cuda_endAllocateToPool", raising=False
    )  # a real one takes no pool that is a word


@pytest.mark.usefixtures("graphs")
def test_graphs_are_captured_aside_and_replayed_where_the_model_runs(current: FakeStream) -> None:
    capture = capture_for(DEVICE)
    assert isinstance(capture, CudaCapture) and capture_for(torch.device("cpu")) is None
    side: Any = capture._stream
    with capture.aside():
        assert side.followed == [current] and current.followed == [], (
            "after what is queued, before anything is captured"
        )
        assert current.entered == [side]
        capture.begin()
        first = capture.end()
        capture.begin()
        second = capture.end()
    assert current.followed == [side] and gc.isenabled()
    first()
    second()
    assert FakeGraph.log == ["begin", "end", "begin", "end", "replay", "replay"]
    with pytest.raises(ZeroDivisionError), capture.aside():
        capture.begin()
        try:
            1 / 0  # noqa: B018
        finally:
            capture.abandon()
            capture.abandon()  # nothing more to forget
    assert current.followed == [side, side] and gc.isenabled()
    assert FakeGraph.log[-2:] == ["begin", "end"]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("abandoned", [False, True])
@pytest.mark.parametrize("public_only", [False, True])
def test_a_graph_whose_capture_failed_is_kept_and_the_next_one_has_its_own_pool(
    abandoned: bool, public_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's allocator still asks it, and takes its pool for one that is being recorded."""
    ended: list[tuple[int, str]] = []
    if public_only:
        monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    else:
        end = lambda index, pool: ended.append((index, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    capture = capture_for(DEVICE)
    assert isinstance(capture, CudaCapture)
    with capture.aside():
        for _ in range(2):
            capture.begin()
            capture.end()
        capture.begin()
        failed = weakref.ref(capture._graph)
        if abandoned:
            capture.abandon()
        else:
            with pytest.raises(RuntimeError, match="invalidated"):
                capture.end()
            capture.abandon()  # as callers do after an error
        gc.collect()
        assert failed() is not None
        capture.begin()
        capture.end()
    assert ended == ([] if public_only else [(0, "pool")])


class FakeRuntime:
    """cudaHostRegister that refuses ranges which overlap `taken`, or everything, or flags."""

    def __init__(
        self,
        taken: tuple[int, int] | None = None,
        refuse: bool = False,
        refused_flags: tuple[int, ...] = (),
    ) -> None:
        self.taken, self.refuse, self.refused_flags = taken, refuse, refused_flags
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
    known, calls = dict(runtime.ranges), runtime.calls
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
    assert "cannot be registered" in caplog.text and "weights: memory" not in caplog.text
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
    assert runtime.ranges and not host.slow
    host.release()
    assert not runtime.ranges
