"""Choose decode tile sizes by trying them on the device, once for each shape.

Results are kept in a file. Only speed depends on them: without a file, or with a damaged one,
`Blocks.of` decides.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from hybrimoe_plugin.cache_folder import write_atomic
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout
from hybrimoe_plugin.device.cuda_timer import Timer
from hybrimoe_plugin.files import read_regular

log = logging.getLogger(__name__)

Run = Callable[[Blocks], tuple[Callable[[], object], Callable[[], object]]]
"""(gate and up, down) of one decode call with these tile sizes.

Each run may compute other slots.
"""

CACHE_BYTES = 64 << 20
"""More than any device's second-level cache holds: 50 MB on an H100 or H200."""

LARGEST = 1024
"""Largest tile size that a file may ask for; larger ones would take minutes to compile."""


@runtime_checkable
class Tunable(Protocol):
    """Kernels that are fitted to the device: first which of them compute, then their tile sizes."""

    def prove(self, shapes: Sequence[tuple[SlotLayout, int]], buffer: torch.Tensor) -> None:
        """Let faster kernels take over if here they compute what the plain ones do.

        Args:
            shapes: (layout, top k) of all layers.
            buffer: [slots, slot bytes] uint8; some of the slots are overwritten.
        """
        ...

    def tune(self, layout: SlotLayout, top_k: int, buffer: torch.Tensor, timer: Timer) -> None:
        """Try tile sizes for decode, unless this shape has been tuned before.

        Args:
            buffer: [slots, slot bytes] uint8; whatever lies there is computed.
            timer: times device work in us.
        """
        ...


def candidates(first: Blocks) -> list[Blocks]:
    """Tile sizes around a first guess: half and double the rows and the warps."""
    found = [first]
    fewest = max(1, first.decode_warps // 2)
    for scale in (0.5, 1, 2, 4):
        gate_rows = max(1, int(first.gate_rows * scale))
        down_rows = max(1, int(first.down_rows * scale))
        for warps in (fewest, 2 * fewest, 4 * fewest):
            found.append(
                first._replace(
                    gate_rows=gate_rows,
                    down_rows=down_rows,
                    decode_warps=warps,
                    down_warps=warps,
                )
            )
    return list(dict.fromkeys(found))  # each of them once


def slot_groups(slots: int, top_k: int, layout: SlotLayout) -> list[tuple[int, ...]]:
    """Groups of `top_k` slots for one decode call after another.

    In a model an expert's bytes come from the device's memory. So there are as many groups as it
    takes for the second-level cache to have forgotten a group when calls that take them in turn
    come back to it, or as many as the buffer has slots for.
    """
    # Each stage is timed alone.
    stage_bytes = min(layout.down.size, layout.gate.size + layout.up.size)
    wanted = -(-2 * CACHE_BYTES // (stage_bytes * top_k))
    count = min(wanted, slots // top_k)
    groups = []
    for group in range(count):
        first = group * top_k
        groups.append(tuple(range(first, first + top_k)))
    return groups


def tune(first: Blocks, run: Run, timer: Timer) -> Blocks:
    """The fastest sizes for gate and up, and for down.

    A candidate that does not compile is left out.
    """
    best = first
    fastest_gate_up = fastest_down = float("inf")
    for blocks in candidates(first):
        try:
            gate_up_us, down_us = (timer(stage) for stage in run(blocks))
        except Exception as error:  # out of registers or shared memory shows in many ways
            log.debug("%s: %s", blocks, error)
            continue
        if gate_up_us < fastest_gate_up:
            fastest_gate_up = gate_up_us
            best = best._replace(gate_rows=blocks.gate_rows, decode_warps=blocks.decode_warps)
        if down_us < fastest_down:
            fastest_down = down_us
            best = best._replace(down_rows=blocks.down_rows, down_warps=blocks.down_warps)
    return best


class Tuned:
    """Tile sizes by shape, read from and written to a JSON file.

    Those of kernels for int8 activations are others.

    Args:
        path: None to keep them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Blocks] = {}
        if path is None:
            return
        try:
            if os.path.exists(path):  # Path.exists may raise
                data = json.loads(read_regular(path, 1 << 20))
                self._known = {str(key): _blocks(sizes) for key, sizes in data.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            log.warning(
                "%s: cannot read the tuned tile sizes (%s); they are measured again", path, error
            )

    def get(self, layout: SlotLayout, top_k: int, int8: bool = False) -> Blocks | None:
        return self._known.get(_key(layout, top_k, int8))

    def put(self, layout: SlotLayout, top_k: int, blocks: Blocks, int8: bool = False) -> None:
        self._known[_key(layout, top_k, int8)] = blocks
        if self._path is None:
            return
        try:
            write_atomic(self._path, json.dumps(self._known, indent=1))
        except OSError as error:
            log.warning("%s: cannot keep the tuned tile sizes (%s)", self._path, error)


def _blocks(sizes: Any) -> Blocks:
    """Sizes from a file. Raises: ValueError, TypeError: not what `tune` may have found."""
    blocks = Blocks(*sizes)
    for size in blocks:
        if type(size) is not int or not 1 <= size <= LARGEST:
            raise ValueError(f"tile sizes must be whole numbers of 1 to {LARGEST}, found {sizes}")
        if size.bit_count() != 1:
            raise ValueError(f"tile sizes must be powers of two, found {sizes}")
    return blocks


def _key(layout: SlotLayout, top_k: int, int8: bool) -> str:
    """Name of a shape, and of the kernels that compute it, in the file."""
    parts = [f"{part.type_name} {part.rows}x{part.columns}" for part in layout.parts]
    parts.append(f"top {top_k}")
    if int8:
        parts.append("int8")
    return ", ".join(parts)
