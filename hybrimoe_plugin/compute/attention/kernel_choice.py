"""Which kernel computes decode attention in CUDA graphs.

torch's does, unless another one is installed, gives what torch's gives, and is faster on a model's
shape:

    attention with split keys    our own (`split_attention`), where Triton is installed
    flashinfer                   where it is installed, for 16-bit types
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator

import torch

from hybrimoe_plugin.compute.attention import flashinfer_pages
from hybrimoe_plugin.compute.attention.decode_attention import (
    AttentionKernel,
    AttentionShape,
    GQAShape,
    MaskedAttention,
    MLAShape,
)
from hybrimoe_plugin.compute.attention.flashinfer_gqa import FlashinferGQA
from hybrimoe_plugin.compute.attention.flashinfer_mla import FlashinferMLA
from hybrimoe_plugin.device.cuda_graphs import Capture, Replay
from hybrimoe_plugin.errors import BackendError

log = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}
"""Relative RMS difference from torch's attention, of the types that have other kernels."""
WIDEST_HEAD, WIDEST_LATENT = 256, 512
"""Columns for which our kernels were compiled and checked (tests/compute)."""
PLANS = 5

Make = Callable[[], AttentionKernel]


def choose(
    shape: AttentionShape,
    device: torch.device,
    capture: Capture,
    position: torch.Tensor,
    layers: int = 1,
) -> AttentionKernel:
    """The fastest kernel for this shape among those that are right.

    Args:
        position: [1] int64 on the device, from which graphs read the entry of the step's token.
        layers: of this shape; a step plans once for all of them.

    Mutates: `position`.
    """
    best: AttentionKernel = MaskedAttention(shape, device)
    least = float("inf")
    for name, make in candidates(shape, device, position):
        try:
            kernel = make()
            torch_us, kernel_us = compare(kernel, device, capture, position)
            step_us = plan_us(kernel)
        except Exception as problem:  # kernels are compiled here, and may raise anything
            reason = " ".join(str(problem).split())[:200]
            log.warning("%s is not used on %s: %s", name, device, reason)
            continue
        log.info(
            "decode attention for %s: torch %.1f us, %s %.1f us and %.1f us a step for its plan",
            shape,
            torch_us,
            name,
            kernel_us,
            step_us,
        )
        of_layer = kernel_us + step_us / layers
        if of_layer < min(torch_us, least):
            best, least = kernel, of_layer
    return best


def candidates(
    shape: AttentionShape, device: torch.device, position: torch.Tensor
) -> Iterator[tuple[str, Make]]:
    """(name, what makes it) of each kernel that may serve this shape beside torch's."""
    if shape.dtype not in TOLERANCES:
        return
    widths = shape.widths
    narrow = max(widths.main, widths.values) <= (WIDEST_HEAD if widths.values else WIDEST_LATENT)
    if triton_runs(device) and narrow:
        # Here, since it imports Triton.
        from hybrimoe_plugin.compute.attention.split_attention import SplitAttention

        yield SplitAttention.name, lambda: SplitAttention(shape, device, position)
    whole_pages = shape.capacity % flashinfer_pages.PAGE == 0
    if flashinfer_pages.installed() and whole_pages and shape.dtype != torch.float32:
        yield FlashinferGQA.name, lambda: flashinfer(shape, device)


def triton_runs(device: torch.device) -> bool:
    """Whether Triton compiles for this device; its interpreter is slower than torch."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compare(
    kernel: AttentionKernel, device: torch.device, capture: Capture, position: torch.Tensor
) -> tuple[float, float]:
    """(torch's, the kernel's) time in us of one call as a graph, with the cache half full.

    Raises:
        BackendError: the two results differ, then or with the cache full or almost empty.

    Mutates: `position`.
    """
    shape = kernel.shape
    example = shape.example(device)
    plain = MaskedAttention(shape, device)

    def plan(held: int) -> None:
        position.fill_(held)
        plain.plan(held)
        kernel.plan(held)

    plan(shape.capacity // 2)
    expected, plain_graph = _captured(lambda: plain(*example), capture)
    found, kernel_graph = _captured(lambda: kernel(*example), capture)
    times = capture.time_us(plain_graph), capture.time_us(kernel_graph)
    _check(expected, found, shape)
    # The graph must follow what is planned, and some kernels plan but once.
    for held in (shape.capacity - 1, 0):
        plan(held)
        plain_graph()
        kernel_graph()
        _check(expected, found, shape)
    return times


def plan_us(kernel: AttentionKernel) -> float:
    """Host time to plan a step, in us: the median of a few."""
    times = []
    for number in range(PLANS):
        started = time.perf_counter_ns()
        kernel.plan(kernel.shape.capacity // 2 + number)
        times.append((time.perf_counter_ns() - started) / 1e3)
    return sorted(times)[PLANS // 2]


def flashinfer(shape: AttentionShape, device: torch.device) -> AttentionKernel:
    """flashinfer's kernel. Raises: Exception: of any kind, if it does not run here."""
    library = importlib.import_module("flashinfer")
    if isinstance(shape, MLAShape):
        return FlashinferMLA(library, shape, device)
    assert isinstance(shape, GQAShape)
    return FlashinferGQA(library, shape, device)


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


def _check(expected: torch.Tensor, found: torch.Tensor, shape: AttentionShape) -> None:
    difference = found.float() - expected.float()
    error = float(difference.norm() / expected.float().norm())
    if not error <= TOLERANCES[shape.dtype]:
        raise BackendError(f"it differs from torch's attention by {error:.2g} for {shape}")
