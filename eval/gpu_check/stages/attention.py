"""Decode attention of our own, its keys split over the device, against torch's under a mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from eval.gpu_check.place import Place, Row
from hybrimoe_plugin.compute.attention import kernel_choice
from hybrimoe_plugin.compute.attention.decode_attention import (
    AttentionKernel,
    AttentionShape,
    GQAShape,
    MLAShape,
)
from hybrimoe_plugin.device.cuda_graphs import Capture, capture_for
from hybrimoe_plugin.errors import BackendError

ROOMS = (1024, 4096, 32_768)
DRY_ROOMS = (48,)


class Case(NamedTuple):
    """The decode attention of one model; its room is set where it is used."""

    model: str
    layers: int
    shape: GQAShape | MLAShape


CASES = (
    Case("Qwen3-30B-A3B", 48, GQAShape(32, 4, 128, 0, torch.bfloat16, 128**-0.5)),
    Case("Mixtral-8x7B", 32, GQAShape(32, 8, 128, 0, torch.bfloat16, 128**-0.5)),
    Case("DeepSeek-V2-Lite", 27, MLAShape(16, 512, 64, 0, torch.bfloat16, 192**-0.5)),
)


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`. Without a card, Triton's interpreter computes, and nothing is timed."""
    # Here, since it imports Triton.
    from hybrimoe_plugin.compute.attention.split_attention import SplitAttention

    capture = capture_for(place.device)
    for case in CASES:
        for room in DRY_ROOMS if place.dry else ROOMS:
            shape = case.shape._replace(capacity=room)
            position = torch.zeros(1, dtype=torch.int64, device=place.device)
            row: Row = {"case": named(case, room), "layers": case.layers}
            kernel = SplitAttention(shape, place.device, position)
            yield {**row, **measured(kernel, place.device, capture, position)}


def named(case: Case, room: int) -> str:
    return f"attention, {case.model}, room of {room} tokens"


def measured(
    kernel: AttentionKernel, device: torch.device, capture: Capture | None, position: torch.Tensor
) -> Row:
    """Whether a kernel is right, and how long it and torch's take where the cache is half full.

    Raises:
        Exception: of any kind, if the kernel does not run here.

    Mutates: `position`.
    """
    error = relative_error(kernel, device, position)
    limit = kernel_choice.TOLERANCES[kernel.shape.dtype]
    if not error <= limit:
        return {"ok": False, "relative_rms": error}
    row: Row = {"ok": True, "relative_rms": error}
    if capture is None:
        return row
    try:
        torch_us, kernel_us = kernel_choice.compare(kernel, device, capture, position)
    except BackendError as problem:
        # The graph does not give what the same call gives outside of one.
        return {"ok": False, "detail": " ".join(str(problem).split())[:300]}
    gbps = _bytes_read(kernel.shape) / kernel_us / 1e3
    return {**row, "torch_us": torch_us, "kernel_us": kernel_us, "gbps": gbps}


def relative_error(kernel: AttentionKernel, device: torch.device, position: torch.Tensor) -> float:
    """Relative RMS difference from torch's attention in float32.

    The largest one of a KV cache with one token, a half-full and a full one. Mutates: `position`.
    """
    shape = kernel.shape
    example = shape.example(device)
    exact = [part.float() for part in example]
    errors = []
    for held in (0, shape.capacity // 2, shape.capacity - 1):
        position.fill_(held)
        kernel.plan(held)
        seen = (torch.arange(shape.capacity, device=device) <= held)[None, None, None]
        right = shape.plain(seen, *exact)
        found = kernel(*example).float()
        errors.append(float((found - right).norm() / right.norm()))
    return max(errors)


def _bytes_read(shape: AttentionShape) -> int:
    """Of a cache that is half full."""
    widths = shape.widths
    values = shape.groups * (widths.main + widths.rest + widths.values)
    return (shape.capacity // 2 + 1) * values * shape.dtype.itemsize
