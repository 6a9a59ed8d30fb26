"""flashinfer's decode attention inside CUDA graphs: where it is installed, right and faster on a
model's shape.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from hybrimoe_plugin.device.cuda_graphs import Capture, Replay
from hybrimoe_plugin.errors import BackendError

log = logging.getLogger(__name__)

PAGE = 16
"""Tokens that a cache of fixed place has in each of flashinfer's pages."""
WORKSPACE_BYTES = 128 << 20
"""What flashinfer's documentation asks for."""
TOLERANCE = 0.02
"""Relative RMS difference from torch's attention in 16-bit types."""
PLANS = 5


class FlashinferKernel(Protocol):
    """Attention of one token over a cache of fixed place. What changes from step to step is set by
    `plan`.
    """

    @property
    def shape(self) -> FlashinferShape: ...

    def plan(self, held: int) -> None:
        """Set the step: this token's row is `held`, and it sees all up to it. Not while
        capturing.
        """
        ...

    def __call__(self, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """[1, heads, 1, width of values] from queries [1, heads, 1, width] and the cache's
        buffers.
        """
        ...


class FlashinferShape(Protocol):
    """One kind of decode attention; hashable."""

    @property
    def room(self) -> int:
        """Tokens that the cache can hold."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def kernel(self, library: Any, device: torch.device) -> FlashinferKernel:
        """flashinfer's; `library` is its module."""
        ...

    def example(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Random queries and buffers."""
        ...

    def plain(self, seen: torch.Tensor, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """torch's; `seen` [1, 1, 1, room] bool is the mask."""
        ...


def choose(
    shape: FlashinferShape, device: torch.device, capture: Capture, layers: int = 1
) -> FlashinferKernel | None:
    """flashinfer for this shape, if it is installed, gives what torch gives, and takes less time;
    else None.

    Args:
        layers: of this shape; a step plans once for all of them.
    """
    if shape.dtype not in (torch.float16, torch.bfloat16) or shape.room % PAGE or not installed():
        return None
    try:
        kernel = shape.kernel(importlib.import_module("flashinfer"), device)
        ours, theirs = compare(kernel, device, capture)
        plan = plan_us(kernel)
    except Exception as problem:  # it compiles on first use, and may raise anything
        log.warning(
            "flashinfer is not used on %s: %s", device, " ".join(str(problem).split())[:200]
        )
        return None
    text = (
        "decode attention for %s: torch %.1f us, flashinfer %.1f us and %.1f us a step for its plan"
    )
    log.info(text, shape, ours, theirs, plan)
    return kernel if theirs + plan / layers < ours else None


def compare(
    kernel: FlashinferKernel, device: torch.device, capture: Capture
) -> tuple[float, float]:
    """(torch's, flashinfer's) time in us of one call as a graph, with the cache half full.

    Raises:
        BackendError: the two do not give the same, then or with the cache full.
    """
    shape = kernel.shape
    example = shape.example(device)
    rows = torch.arange(shape.room, device=device)
    half, full = shape.room // 2, shape.room - 1
    seen = (rows <= half)[None, None, None]
    kernel.plan(half)
    right, ours = _captured(lambda: shape.plain(seen, *example), capture)
    found, theirs = _captured(lambda: kernel(*example), capture)
    times = capture.time_us(ours), capture.time_us(theirs)
    _check(right, found, shape)
    kernel.plan(full)  # the graph must follow what is planned, and some kernels plan but once
    seen.fill_(True)
    ours()
    theirs()
    _check(right, found, shape)
    return times


def plan_us(kernel: FlashinferKernel) -> float:
    """Host time of planning a step, in us: the median of some."""
    times = []
    for number in range(PLANS):
        started = time.perf_counter_ns()
        kernel.plan(kernel.shape.room // 2 + number)
        times.append((time.perf_counter_ns() - started) / 1e3)
    return sorted(times)[PLANS // 2]


def pages(cache: torch.Tensor) -> torch.Tensor:
    """[pages, heads, PAGE, width] over the memory of a buffer [1, heads, room, width]."""
    return cache[0].unflatten(1, (-1, PAGE)).transpose(0, 1)


def table(held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(where each sequence's pages begin and end, the pages) of one sequence, int32 on the CPU,
    where they are read.
    """
    count = held // PAGE + 1
    return torch.tensor([0, count], dtype=torch.int32), torch.arange(count, dtype=torch.int32)


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def _captured(work: Callable[[], torch.Tensor], capture: Capture) -> tuple[torch.Tensor, Replay]:
    """(where the result lies, the replay) of work that was done once before."""
    with capture.aside():
        work()
        capture.begin()
        try:
            result = work()
            return result, capture.end()
        except BaseException:
            capture.abandon()
            raise


def _check(right: torch.Tensor, found: torch.Tensor, shape: FlashinferShape) -> None:
    error = float((found.float() - right.float()).norm() / right.float().norm())
    if not error <= TOLERANCE:
        raise BackendError(f"it differs from torch's attention by {error:.2g} for {shape}")
