"""Whether flashinfer's decode attention is used in CUDA graphs.

It is where it is installed, gives what torch's attention gives, and is faster on a model's shape.
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
"""Tokens of a fixed-address cache in each of flashinfer's pages."""
WORKSPACE_BYTES = 128 << 20
"""What flashinfer's documentation asks for."""
TOLERANCE = 0.02
"""Relative RMS difference from torch's attention in 16-bit types."""
PLANS = 5


class FlashinferKernel(Protocol):
    """Attention of one token over a fixed-address cache; `plan` sets what changes by step."""

    @property
    def shape(self) -> FlashinferShape: ...

    def plan(self, held: int) -> None:
        """Set the step: its token is number `held` in the cache and attends to all up to itself.

        Not to be called while capturing.
        """
        ...

    def __call__(self, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """[1, heads, 1, width of values] from queries [1, heads, 1, width] and cache buffers."""
        ...


class FlashinferShape(Protocol):
    """One kind of decode attention; hashable."""

    @property
    def capacity(self) -> int:
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

    def plain(
        self, visible: torch.Tensor, query: torch.Tensor, *cache: torch.Tensor
    ) -> torch.Tensor:
        """torch's; `visible` [1, 1, 1, capacity] bool is the mask."""
        ...


def choose(
    shape: FlashinferShape, device: torch.device, capture: Capture, layers: int = 1
) -> FlashinferKernel | None:
    """flashinfer's kernel for this shape, if it is installed, correct and faster; else None.

    Args:
        layers: of this shape; a step plans once for all of them.
    """
    half_precision = shape.dtype in (torch.float16, torch.bfloat16)
    if not half_precision or shape.capacity % PAGE or not installed():
        return None
    try:
        kernel = shape.kernel(importlib.import_module("flashinfer"), device)
        torch_us, flashinfer_us = compare(kernel, device, capture)
        step_us = plan_us(kernel)
    except Exception as problem:  # it compiles on first use, and may raise anything
        reason = " ".join(str(problem).split())[:200]
        log.warning("flashinfer is not used on %s: %s", device, reason)
        return None
    log.info(
        "decode attention for %s: torch %.1f us, flashinfer %.1f us and %.1f us a step for its "
        "plan",
        shape,
        torch_us,
        flashinfer_us,
        step_us,
    )
    return kernel if flashinfer_us + step_us / layers < torch_us else None


def compare(
    kernel: FlashinferKernel, device: torch.device, capture: Capture
) -> tuple[float, float]:
    """(torch's, flashinfer's) time in us of one call as a graph, with the cache half full.

    Raises:
        BackendError: the two results differ, then or with the cache full.
    """
    shape = kernel.shape
    example = shape.example(device)
    positions = torch.arange(shape.capacity, device=device)
    half = shape.capacity // 2
    full = shape.capacity - 1
    visible = (positions <= half)[None, None, None]
    kernel.plan(half)
    expected, torch_graph = _captured(lambda: shape.plain(visible, *example), capture)
    found, flashinfer_graph = _captured(lambda: kernel(*example), capture)
    times = capture.time_us(torch_graph), capture.time_us(flashinfer_graph)
    _check(expected, found, shape)
    kernel.plan(full)  # the graph must follow what is planned, and some kernels plan but once
    visible.fill_(True)
    torch_graph()
    flashinfer_graph()
    _check(expected, found, shape)
    return times


def plan_us(kernel: FlashinferKernel) -> float:
    """Host time to plan a step, in us: the median of a few."""
    times = []
    for number in range(PLANS):
        started = time.perf_counter_ns()
        kernel.plan(kernel.shape.capacity // 2 + number)
        times.append((time.perf_counter_ns() - started) / 1e3)
    return sorted(times)[PLANS // 2]


def pages(cache: torch.Tensor) -> torch.Tensor:
    """[pages, heads, PAGE, width] over the memory of a buffer [1, heads, capacity, width]."""
    return cache[0].unflatten(1, (-1, PAGE)).transpose(0, 1)


def table(held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """flashinfer's page table of one sequence: (where its pages begin and end, the pages).

    int32 on the CPU, where flashinfer reads them.
    """
    count = held // PAGE + 1
    return torch.tensor([0, count], dtype=torch.int32), torch.arange(count, dtype=torch.int32)


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def _captured(work: Callable[[], torch.Tensor], capture: Capture) -> tuple[torch.Tensor, Replay]:
    """(where the result lies, the replay) of work, which is run once before it is captured."""
    with capture.aside():
        work()
        capture.begin()
        try:
            result = work()
            return result, capture.end()
        except BaseException:
            capture.abandon()
            raise


def _check(expected: torch.Tensor, found: torch.Tensor, shape: FlashinferShape) -> None:
    difference = found.float() - expected.float()
    error = float(difference.norm() / expected.float().norm())
    if not error <= TOLERANCE:
        raise BackendError(f"it differs from torch's attention by {error:.2g} for {shape}")
