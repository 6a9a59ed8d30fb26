"""What torch.cuda is asked for: streams, events, one synchronisation, graphs; played by fakes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_plugin.device import streams as module
from hybrimoe_plugin.device.cuda_graphs import CudaCapture, capture_for
from hybrimoe_plugin.device.raw_copies import HOST_TO_DEVICE
from hybrimoe_plugin.device.streams import AHEAD, COMPUTE, LINK, REPACK, CudaStreams
from hybrimoe_plugin.errors import BackendError

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
        self.cuda_stream = id(self)
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
    stream = FakeStream()
    entered = []

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
    streams.enqueue(LINK, lambda: done.append("link"))
    streams.enqueue(COMPUTE, lambda: done.append("compute"))
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


def test_copies_and_launches_get_the_queues_handle(
    current: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    status = 0

    def copy(*args: int) -> int:
        calls.append(args)
        return status

    assert not CudaStreams(DEVICE).takes_addresses, "no runtime is loaded here"
    monkeypatch.setattr(module, "loaded_copy", lambda: copy)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    streams = CudaStreams(DEVICE)
    assert streams.takes_addresses
    link, repack = (streams._streams[name].cuda_stream for name in (LINK, REPACK))
    streams.copy(LINK, 256, 4096, 10)
    assert calls == [(256, 4096, 10, HOST_TO_DEVICE, link)]
    status = 700
    with pytest.raises(BackendError, match=r"copy of 10 bytes to cuda:0: CUDA error 700"):
        streams.copy(LINK, 256, 4096, 10)

    entered: list[torch.device] = []

    @contextmanager
    def inside(device: torch.device) -> Iterator[None]:
        entered.append(device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "current_device", lambda: device.index)
            yield

    monkeypatch.setattr(torch.cuda, "device", inside)
    handles: list[int] = []
    status = 0
    for index in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        streams.launch(REPACK, handles.append)
        streams.copy(LINK, index, 0, 1)
        assert streams.elsewhere() == bool(index)
    assert handles == [repack, repack]
    assert [call[0] for call in calls[2:]] == [0, 1]
    assert entered == [DEVICE, DEVICE], "only where another device is current"
    assert current.entered == [], "no stream is entered"


@pytest.mark.usefixtures("current")
def test_an_event_is_recorded_anew_only_when_nobody_refers_to_it() -> None:
    streams = CudaStreams(DEVICE)
    first = streams.record(LINK)
    second = streams.record(LINK)
    assert first.event is not second.event
    freed = second.event
    del second
    third = streams.record(REPACK)
    assert third.event is freed
    assert first.event.stream is streams._streams[LINK], "the one that is kept is as it was"
    copy = streams.pending_copy([])
    kept = copy._events[0].event
    del first, third
    assert {streams.record(AHEAD).event is kept for _ in range(5)} == {False}


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
    copy = streams.copy_to_host([*there, here])  # type: ignore[list-item]
    assert copies == [True] * 5
    assert FakeStream.stops == 0
    found = copy.wait()
    assert FakeStream.stops == 1
    assert copy.poll() is None, "the event has not been reached"
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
    assert isinstance(capture, CudaCapture)
    assert capture_for(torch.device("cpu")) is None
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
    assert current.followed == [side]
    assert gc.isenabled()
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
    assert current.followed == [side, side]
    assert gc.isenabled()
    assert FakeGraph.log[-2:] == ["begin", "end"]


@pytest.mark.usefixtures("graphs")
def test_the_pool_outlives_all_graphs_that_are_dropped() -> None:
    """As those are with which attention kernels are compared."""
    capture = capture_for(DEVICE)
    assert isinstance(capture, CudaCapture)
    found = []
    with capture.aside():
        for _ in range(2):
            capture.begin()
            found.append(weakref.ref(capture._graph))
            capture.end()
            gc.collect()
            assert found[-1]() is not None
    assert found[0]() is None, "one is enough"


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
