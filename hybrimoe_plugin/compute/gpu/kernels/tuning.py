"""Choose decode tile sizes by trying them on the device, once for each shape; results are kept in a
file.

Only speed depends on it: without a file, or with a damaged one, `Blocks.of` decides.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
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
"""(gate and up, down) of one decode call with these tile sizes; each run may compute other slots.
"""

CACHE_BYTES = 64 << 20
"""More than any device's second-level cache holds: 50 MB on an H100 or H200."""


LARGEST = 1024
"""Tile size that a file may ask for; larger ones would take minutes to compile."""


@runtime_checkable
class Tunable(Protocol):
    """Kernels whose speed depends on tile sizes."""

    def tune(self, layout: SlotLayout, top_k: int, buffer: torch.Tensor, timer: Timer) -> None:
        """Try tile sizes for decode on whatever lies in the slots, unless this shape has been tuned
        before.
        """
        ...


def candidates(first: Blocks) -> list[Blocks]:
    """Tile sizes around a first guess: half and double the rows and the warps."""
    found = [first]
    for rows in (0.5, 1, 2, 4):
        for warps in (2, 4, 8):
            found.append(
                first._replace(
                    gate_rows=max(1, int(first.gate_rows * rows)),
                    down_rows=max(1, int(first.down_rows * rows)),
                    decode_warps=warps,
                    down_warps=warps,
                )
            )
    return list(dict.fromkeys(found))


def slot_groups(slots: int, top_k: int, layout: SlotLayout) -> list[tuple[int, ...]]:
    """Slots for one decode call after another, each with `top_k` of its own.

    In a model an expert's bytes come from the device's memory. Calls that take the groups in turn
    read so many other bytes in between that the second-level cache has forgotten a group when it
    comes again, if the buffer has as many slots; else it is as many groups as there are.
    """
    stage_bytes = min(
        layout.down.size, layout.gate.size + layout.up.size
    )  # each stage is timed alone
    wanted = -(-2 * CACHE_BYTES // (stage_bytes * top_k))
    count = min(wanted, slots // top_k)
    return [tuple(range(group * top_k, (group + 1) * top_k)) for group in range(count)]


def tune(first: Blocks, run: Run, timer: Timer) -> Blocks:
    """The fastest sizes for gate and up, and for down; a candidate that does not compile is left
    out.
    """
    best = first
    times: dict[str, float] = {}
    for blocks in candidates(first):
        try:
            spent = [timer(stage) for stage in run(blocks)]
        except Exception as error:  # out of registers or shared memory shows in many ways
            log.debug("%s: %s", blocks, error)
            continue
        if spent[0] < times.get("gate", float("inf")):
            times["gate"] = spent[0]
            best = best._replace(gate_rows=blocks.gate_rows, decode_warps=blocks.decode_warps)
        if spent[1] < times.get("down", float("inf")):
            times["down"] = spent[1]
            best = best._replace(down_rows=blocks.down_rows, down_warps=blocks.down_warps)
    return best


class Tuned:
    """Tile sizes by shape, read from and written to a JSON file; None keeps them in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Blocks] = {}
        try:
            if path is not None and os.path.exists(path):  # Path.exists may raise
                data = json.loads(read_regular(path, 1 << 20))
                self._known = {str(key): _blocks(sizes) for key, sizes in data.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            log.warning(
                "%s: cannot read the tuned tile sizes (%s); they are measured again", path, error
            )

    def get(self, layout: SlotLayout, top_k: int) -> Blocks | None:
        return self._known.get(_key(layout, top_k))

    def put(self, layout: SlotLayout, top_k: int, blocks: Blocks) -> None:
        self._known[_key(layout, top_k)] = blocks
        if self._path is None:
            return
        try:
            write_atomic(self._path, json.dumps(self._known, indent=1))
        except OSError as error:
            log.warning("%s: cannot keep the tuned tile sizes (%s)", self._path, error)


def _blocks(sizes: Any) -> Blocks:
    """Raises: ValueError, TypeError: not what `tune` may have found."""
    blocks = Blocks(*sizes)
    if any(type(size) is not int or not 1 <= size <= LARGEST for size in blocks):
        raise ValueError(f"tile sizes must be whole numbers of 1 to {LARGEST}, found {sizes}")
    if any(size & (size - 1) for size in blocks):
        raise ValueError(f"tile sizes must be powers of two, found {sizes}")
    return blocks


def _key(layout: SlotLayout, top_k: int) -> str:
    parts = [f"{part.type_name} {part.rows}x{part.columns}" for part in layout]
    return ", ".join([*parts, f"top {top_k}"])
