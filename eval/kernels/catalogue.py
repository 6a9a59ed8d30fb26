"""Every device kernel with the arguments that it is compiled with, for one GGML type.

Shapes are Qwen3-30B-A3B's, tiles those that follow from them. A kernel that is new needs one
function here that gives its `Build`, and a place in `_decode` or `other_builds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels import decode, linear, prefill, repack
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, PLANES, slot_layout
from hybrimoe_plugin.core import ExpertSpec

HIDDEN, INNER, TOP_K = 2048, 768, 8
UNIT = 64
"""Columns that the kernels' loops count in."""
LOOP_PASSES = 8
"""So many that the compiler makes a loop of them."""
FLOAT, INT8 = "float", "int8"
"""What activations are multiplied as."""

_STATES, _BYTES, _INTS = "*bf16", "*u8", "*i64"
_SLOTS = {
    "slots": _BYTES,
    "tables": _BYTES,
    "slot_bytes": "i64",
    "up_offset": "i32",
    "down_offset": "i32",
}
_TILES = {"order": _INTS, "tile_slots": _INTS, "tile_firsts": _INTS, "tile_ends": _INTS}
_SWIGLU = {"BIASES": -1, "KIND": "silu", "ALPHA": 1.0, "LIMIT": 0.0, "UP_SHIFT": 0.0}
_GPT_OSS = {"BIASES": 1 << 22, "KIND": "silu", "ALPHA": 1.702, "LIMIT": 7.0, "UP_SHIFT": 1.0}
"""The epilogue of the model that MXFP4 comes with."""


class Build(NamedTuple):
    """One kernel as it is compiled."""

    stage: str
    """What it computes, such as `gate_up_decode`."""
    kernel: Any
    types: Mapping[str, str]
    """Argument -> its type in Triton's words; names that the kernel lacks are passed over."""
    constants: Mapping[str, Any]
    warps: int
    activations: str = FLOAT
    pass_weights: int = 0
    """Weights that one pass of a program's loop multiplies, of a decode kernel."""
    passes: int = 0
    """Of one program's loop."""
    weights: int = 0
    """Weights of a program, without those of its last pass that lie beyond the matrix."""


class Sizes(NamedTuple):
    """A layer, and the tiles that its kernels are compiled with."""

    hidden: int
    inner: int
    blocks: Blocks


def decode_builds(kind: str) -> list[Build]:
    """Gate and up, and down, of few tokens at the model's shape, for each kind of activations."""
    return _decode(kind, _sizes(kind))


def other_builds(kind: str) -> list[Build]:
    """All other kernels of a type."""
    sizes = _sizes(kind)
    found = [*_prefill(kind, sizes), _linear_decode(kind), _linear_prefill(kind, sizes)]
    if kind in PLANES:
        found.append(_repack(kind))
    return found


def repeated(kind: str, passes: int) -> list[Build]:
    """`decode_builds` with the same tiles, and columns for so many passes of each loop."""
    blocks = _sizes(kind).blocks
    hidden = passes * blocks.gate_units * UNIT
    inner = passes * blocks.down_units * UNIT
    return _decode(kind, Sizes(hidden, inner, blocks))


def _decode(kind: str, sizes: Sizes) -> list[Build]:
    return [_gate_up_decode(kind, sizes), _down_decode(kind, sizes)]


def _sizes(kind: str) -> Sizes:
    spec = ExpertSpec(HIDDEN, INNER, 128, TOP_K, kind, kind, kind, 4096, 4096, 4096)
    return Sizes(HIDDEN, INNER, Blocks.of(slot_layout(spec, planar=True), TOP_K))


def _epilogue(kind: str) -> dict[str, Any]:
    return _GPT_OSS if kind == "MXFP4" else _SWIGLU


def _gate_up_decode(kind: str, sizes: Sizes) -> Build:
    blocks = sizes.blocks
    constants = {
        "TOP_K": TOP_K,
        "GATE": kind,
        "UP": kind,
        "HIDDEN": sizes.hidden,
        "INNER": sizes.inner,
        "BLOCK_ROWS": blocks.gate_rows,
        "BLOCK_UNITS": blocks.gate_units,
        **_epilogue(kind),
    }
    columns = blocks.gate_units * UNIT
    return Build(
        "gate_up_decode",
        decode.gate_up_decode,
        {**_SLOTS, "hidden": _STATES, "slot_ids": _INTS, "activations": "*fp32"},
        constants,
        blocks.decode_warps,
        pass_weights=2 * blocks.gate_rows * columns,
        passes=-(-sizes.hidden // columns),
        weights=2 * blocks.gate_rows * sizes.hidden,
    )


def _down_decode(kind: str, sizes: Sizes) -> Build:
    blocks = sizes.blocks
    constants = {
        "TOP_K": TOP_K,
        "PLACES": TOP_K,
        "DOWN": kind,
        "HIDDEN": sizes.hidden,
        "INNER": sizes.inner,
        "BLOCK_ROWS": blocks.down_rows,
        "BLOCK_UNITS": blocks.down_units,
        "BIASES": _epilogue(kind)["BIASES"],
    }
    types = {
        **_SLOTS,
        "activations": "*fp32",
        "slot_ids": _INTS,
        "weights": _STATES,
        "output": _STATES,
    }
    rows = TOP_K * blocks.down_rows
    columns = blocks.down_units * UNIT
    return Build(
        "down_decode",
        decode.down_decode,
        types,
        constants,
        blocks.down_warps,
        pass_weights=rows * columns,
        passes=-(-sizes.inner // columns),
        weights=rows * sizes.inner,
    )


def _prefill(kind: str, sizes: Sizes) -> list[Build]:
    """Gate and up, and down, of many tokens."""
    blocks = sizes.blocks
    shape = {"HIDDEN": sizes.hidden, "INNER": sizes.inner, **_dot(blocks)}
    epilogue = _epilogue(kind)
    types = {
        **_SLOTS,
        **_TILES,
        "hidden": _STATES,
        "activations": _STATES,
        "parts": _STATES,
        "weights": _STATES,
    }
    gate = {**shape, "TOP_K": TOP_K, "GATE": kind, "UP": kind, **epilogue}
    down = {**shape, "DOWN": kind, "BIASES": epilogue["BIASES"]}
    warps = blocks.prefill_warps
    return [
        Build("gate_up_prefill", prefill.gate_up_prefill, types, gate, warps),
        Build("down_prefill", prefill.down_prefill, types, down, warps),
    ]


def _linear_decode(kind: str) -> Build:
    constants = {"BLOCK_ROWS": 4, "BLOCK_UNITS": 32, **_matrix(kind)}
    return Build("linear_decode", linear.linear_decode, _LINEAR, constants, 4)


def _linear_prefill(kind: str, sizes: Sizes) -> Build:
    constants = {**_matrix(kind), **_dot(sizes.blocks)}
    return Build("linear_prefill", linear.linear_prefill, _LINEAR, constants, 4)


_LINEAR = {
    "states": _STATES,
    "matrix": _BYTES,
    "tables": _BYTES,
    "output": _STATES,
    "tokens": "i32",
}


def _matrix(kind: str) -> dict[str, Any]:
    return {"KIND": kind, "ROWS": 4096, "COLUMNS": HIDDEN}


def _dot(blocks: Blocks) -> dict[str, Any]:
    return {"BLOCK_TOKENS": blocks.tokens, "BLOCK_ROWS": blocks.rows, "DOT": tl.bfloat16}


def _repack(kind: str) -> Build:
    """The kernel that splits a type's blocks into planes."""
    word, pointer = (1, _BYTES) if BLOCK_BYTES[kind] % 2 else (2, "*i16")
    constants = {
        "BLOCK_WORDS": BLOCK_BYTES[kind] // word,
        "OFFSETS": tuple(at // word for at, _ in PLANES[kind]),
        "WORDS": tuple(count // word for _, count in PLANES[kind]),
        "PER_PROGRAM": 32,
    }
    types = {"source": pointer, "target": pointer, "blocks": "i32"}
    return Build("blocks_to_planes", repack.blocks_to_planes, types, constants, 4)
