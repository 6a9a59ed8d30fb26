"""A CUDA driver that does nothing: torch.cuda's objects, played by fakes.

The plugin's own code for CUDA runs on them: `CudaStreams`, `CudaCapture` and all that uses them.
Streams, events and graphs cost what a Python call costs. Every call can be recorded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from time import perf_counter_ns
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from eval.host_path.edges import HOST, Clock, Edges
from hybrimoe_plugin.device import streams

Tensor = torch.Tensor

WAITS = "waits for the device"


class DriverCall(NamedTuple):
    """One call of the driver, or one operation on the device."""

    name: str
    stream: str
    at_us: float
    stops: str = ""
    """Why it makes the host wait for the device; empty where it does not."""
    event: int = 0
    """Which event it asks, for queries."""
    reached: bool = False
    """The answer, for queries."""


class Number:
    """A counter on the device, which is followed since graphs copy it to the host as a mark."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        """Kept alive, so that no other one gets its address."""
        self.value = 0

    def add(self, amount: int) -> None:
        self.value += amount

    def put(self, value: int) -> None:
        self.value = value

    def show(self, target: NDArray[np.int64]) -> None:
        """Copy it to the host."""
        target[0] = self.value


class Driver:
    """The device as the host sees it.

    Attributes:
        calls: what was called, while `recording`; None otherwise.
        reached: whether events are reached when they are asked; the device is late otherwise.
        edges: the order of what streams do, where it is checked; None otherwise.
    """

    def __init__(self) -> None:
        self.calls: list[DriverCall] | None = None
        self.reached = True
        self.edges: Edges | None = None
        self.waited: dict[str, int] = {}
        """Stream -> the last call of `calls` that the host knows to be over, by an event."""
        self.main = Stream(self, name="compute")
        self.current = self.main
        self.graph: Graph | None = None
        """The graph that is being captured."""
        self.numbers: dict[int, Number] = {}
        """By the address of their memory."""
        self._names: dict[int, str] = {}
        """Handle of a stream -> its name."""

    def do(self, work: Callable[[], None]) -> None:
        """Let the device do what the host can see, now or whenever the graph is replayed."""
        if self.graph is not None:
            self.graph.works.append(work)
        else:
            work()

    def use(self, start: int, nbytes: int, write: bool, stream: str = "") -> None:
        """Check a use of the device's memory, if the order is checked.

        Args:
            stream: on which; default the current one.

        Raises:
            RuntimeError: another use may come at the same time.
        """
        if self.edges is not None and self.graph is None:
            self.edges.use(stream or self.current.name, start, start + nbytes, write)

    def named(self, stream: int) -> str:
        """A stream by its handle."""
        return self._names[stream]

    def synchronize(self, _device: object = None) -> None:
        self.note("cudaDeviceSynchronize", stops=WAITS)
        if self.edges is not None:
            self.edges.wait_for_all()

    def note(self, name: str, stream: str = "", stops: str = "") -> None:
        """Record a call, if calls are recorded."""
        if self.calls is not None:
            self.calls.append(DriverCall(name, stream, perf_counter_ns() / 1e3, stops))

    def note_query(self, name: str, stream: str, reached: bool, event: int = 0) -> None:
        """Record a question and its answer, if calls are recorded."""
        if self.calls is not None:
            asked = DriverCall(name, stream, perf_counter_ns() / 1e3, "", event, reached)
            self.calls.append(asked)

    @contextmanager
    def recording(self) -> Iterator[list[DriverCall]]:
        """Record every call of the block."""
        calls: list[DriverCall] = []
        self.calls = calls
        self.waited.clear()
        try:
            yield calls
        finally:
            self.calls = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the place of torch.cuda's objects, and of pinned memory."""
        with ExitStack() as stack:
            for name, value in self._stand_ins().items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(mock.patch.object(torch, "empty", _without_pinning(torch.empty)))
            stack.enter_context(mock.patch.object(Tensor, "pin_memory", _itself))
            copy = mock.patch.object(streams, "loaded_copy", lambda: self._copy, create=True)
            stack.enter_context(copy)
            yield

    def _stand_ins(self) -> dict[str, Any]:
        return {
            "Stream": self._make_stream,
            "Event": lambda *_args, **_kwargs: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "stream": lambda stream: _Entered(self, stream),
            "device": lambda _device: nullcontext(),
            "current_stream": lambda _device=None: self.current,
            "current_device": lambda: None,  # the index of the device that is played
            "graph_pool_handle": lambda: (0, 0),
            "synchronize": self.synchronize,
            "empty_cache": lambda: self.note("cudaFree", stops=WAITS),
            "cudart": lambda: _Runtime,
        }

    def _copy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> int:
        """cudaMemcpyAsync, for what a foreign call costs."""
        if self.calls is not None:
            self.note("copy to the device", self.named(stream))
        if self.edges is not None:
            self.use(target, nbytes, True, self.named(stream))
        _foreign_call(target, source, nbytes, kind, stream)
        return 0

    def _make_stream(self, *_args: Any, priority: int = 0, **_kwargs: Any) -> Stream:
        made = Stream(self, f"stream {len(self._names) + 1}", priority)
        self._names[made.cuda_stream] = made.name
        return made


class Stream:
    """A queue of the device."""

    def __init__(self, driver: Driver, name: str, priority: int = 0) -> None:
        self.name = name
        self.priority = priority
        self.cuda_stream = id(self)
        """Its handle."""
        self._driver = driver

    def wait_event(self, event: Event) -> None:
        driver = self._driver
        driver.note("cudaStreamWaitEvent", self.name)
        if driver.edges is not None:
            driver.edges.wait(self.name, event.point)

    def wait_stream(self, other: Stream) -> None:
        driver = self._driver
        driver.note("cudaStreamWaitEvent", self.name)
        if driver.edges is not None:
            driver.edges.wait(self.name, driver.edges.point(other.name))

    def synchronize(self) -> None:
        driver = self._driver
        driver.note("cudaStreamSynchronize", self.name, WAITS)
        if driver.edges is not None:
            driver.edges.wait(HOST, driver.edges.point(self.name))

    def query(self) -> bool:
        reached = self._driver.reached
        self._driver.note_query("cudaStreamQuery", self.name, reached)
        return reached


class Event:
    """A point in a queue."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._stream = ""
        self._place = 0
        """Among the recorded calls; 0 where none are recorded."""
        self.point: Clock = {}
        """What has happened when it is reached, where the order is checked."""

    def record(self, stream: Stream | None = None) -> None:
        driver = self._driver
        self._stream = (stream or driver.current).name
        driver.note("cudaEventRecord", self._stream)
        self._place = len(driver.calls or ())
        if driver.edges is not None:
            self.point = driver.edges.point(self._stream)

    def query(self) -> bool:
        driver = self._driver
        reached = self._is_reached()
        driver.note_query("cudaEventQuery", self._stream, reached, id(self))
        return reached

    def synchronize(self) -> None:
        driver = self._driver
        driver.note("cudaEventSynchronize", self._stream, WAITS)
        driver.waited[self._stream] = self._place
        if driver.edges is not None:
            driver.edges.wait(HOST, self.point)

    def _is_reached(self) -> bool:
        driver = self._driver
        if driver.edges is None:
            return driver.reached or self._place <= driver.waited.get(self._stream, -1)
        if driver.reached:
            driver.edges.wait(HOST, self.point)
        return driver.edges.known(self.point)


class Graph:
    """A captured graph, whose replay only moves the marks by which the host follows it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.on_replay: Callable[[], Any] | None = None
        """Called at each replay, before anything else."""
        self.works: list[Callable[[], None]] = []
        """What the device does in it that the host can see."""

    def capture_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._driver.graph = self

    def capture_end(self) -> None:
        self._driver.graph = None

    def replay(self) -> None:
        self._driver.note("cudaGraphLaunch", self._driver.current.name)
        if self.on_replay is not None:
            self.on_replay()
        for work in self.works:
            work()


class _Entered:
    """`with torch.cuda.stream(...)`."""

    def __init__(self, driver: Driver, stream: Stream) -> None:
        self._driver = driver
        self._stream = stream
        self._before = driver.current

    def __enter__(self) -> None:
        self._driver.current = self._stream

    def __exit__(self, *_error: object) -> None:
        self._driver.current = self._before


class _Runtime:
    """`torch.cuda.cudart()`: registers any memory."""

    @staticmethod
    def cudaHostRegister(_start: int, _bytes: int, _flags: int) -> int:  # noqa: N802
        return 0

    @staticmethod
    def cudaHostUnregister(_start: int) -> int:  # noqa: N802
        return 0


def _make_foreign_call() -> Callable[..., None]:
    """A C function that looks at none of its arguments; takes those of cudaMemcpyAsync."""
    call = ctypes.PyDLL(None).Py_IsInitialized
    pointer = ctypes.c_void_p
    call.argtypes = pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer
    call.restype = None
    return call


_foreign_call = _make_foreign_call()


def _without_pinning(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs)

    return make


def _itself(tensor: Tensor, *_args: Any) -> Tensor:
    return tensor
