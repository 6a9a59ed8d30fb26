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
from hybrimoe_plugin.compute.gpu.kernels.formats.description import INTEGERS
from hybrimoe_plugin.compute.gpu.kernels.int8 import states
from hybrimoe_plugin.compute.gpu.kernels.int8.decode import down_int8, gate_up_int8
from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
from hybrimoe_plugin.compute.gpu.kernels.layout import (
    BLOCK_BYTES,
    PLANES,
    SlotLayout,
    slot_layout,
)
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
    top_k: int
    blocks: Blocks


def decode_builds(kind: str) -> list[Build]:
    """Gate and up, and down, of few tokens at the model's shape, for each kind of activations."""
    return _decode(kind, _sizes(kind), _int8_sizes(kind))


def other_builds(kind: str) -> list[Build]:
    """All other kernels of a type."""
    sizes = _sizes(kind)
    found = [*_prefill(kind, sizes), _linear_decode(kind), _linear_prefill(kind, sizes)]
    if kind in PLANES:
        found.append(_repack(kind))
    if kind in INTEGERS:
        found.append(_quantise())
    return found


def repeated(kind: str, passes: int) -> list[Build]:
    """`decode_builds` with the same tiles, for matrices of which each loop takes so many passes."""
    sizes, int8 = _sizes(kind), _int8_sizes(kind)
    blocks = sizes.blocks
    sizes = sizes._replace(
        hidden=passes * blocks.gate_units * UNIT, inner=passes * blocks.down_units * UNIT
    )
    blocks = int8.blocks
    # Its down goes through the units of all of a token's experts.
    experts = max(1, passes * blocks.down_units * UNIT // int8.inner)
    int8 = int8._replace(hidden=passes * blocks.gate_units * UNIT, top_k=experts)
    return _decode(kind, sizes, int8)


def _decode(kind: str, sizes: Sizes, int8: Sizes) -> list[Build]:
    found = [_gate_up_decode(kind, sizes), _down_decode(kind, sizes)]
    if kind in INTEGERS:
        found += [_gate_up_int8(kind, int8), _down_int8(kind, int8)]
    return found


def _sizes(kind: str) -> Sizes:
    return Sizes(HIDDEN, INNER, TOP_K, Blocks.of(_layout(kind), TOP_K))


def _int8_sizes(kind: str) -> Sizes:
    sizes = _sizes(kind)
    return sizes._replace(blocks=Int8Decode(asm=True).blocks(_layout(kind), TOP_K, sizes.blocks))


def _layout(kind: str) -> SlotLayout:
    spec = ExpertSpec(HIDDEN, INNER, 128, TOP_K, kind, kind, kind, 4096, 4096, 4096)
    return slot_layout(spec, planar=True)


def _epilogue(kind: str) -> dict[str, Any]:
    return _GPT_OSS if kind == "MXFP4" else _SWIGLU


def _gate_up_decode(kind: str, sizes: Sizes) -> Build:
    types = {**_SLOTS, "hidden": _STATES, "slot_ids": _INTS, "activations": "*fp32"}
    return _gate_up(Build("gate_up_decode", decode.gate_up_decode, types, {}, 0), kind, sizes)


def _gate_up_int8(kind: str, sizes: Sizes) -> Build:
    types = {**_SLOTS, "hidden": _BYTES, "slot_ids": _INTS, "activations": _STATES}
    build = Build("gate_up_decode", gate_up_int8, types, {"ASM": True}, 0, INT8)
    return _gate_up(build, kind, sizes)


def _gate_up(build: Build, kind: str, sizes: Sizes) -> Build:
    """With what both kinds of activations have in common."""
    blocks = sizes.blocks
    constants = {
        "TOP_K": sizes.top_k,
        "GATE": kind,
        "UP": kind,
        "HIDDEN": sizes.hidden,
        "INNER": sizes.inner,
        "BLOCK_ROWS": blocks.gate_rows,
        "BLOCK_UNITS": blocks.gate_units,
        **_epilogue(kind),
        **build.constants,
    }
    columns = blocks.gate_units * UNIT
    return build._replace(
        constants=constants,
        warps=blocks.decode_warps,
        pass_weights=2 * blocks.gate_rows * columns,
        passes=-(-sizes.hidden // columns),
        weights=2 * blocks.gate_rows * sizes.hidden,
    )


def _down_decode(kind: str, sizes: Sizes) -> Build:
    types = {**_DOWN, "activations": "*fp32"}
    build = Build("down_decode", decode.down_decode, types, {"PLACES": TOP_K}, 0)
    columns = sizes.blocks.down_units * UNIT
    return _down(build, kind, sizes)._replace(
        pass_weights=TOP_K * sizes.blocks.down_rows * columns,
        passes=-(-sizes.inner // columns),
    )


def _down_int8(kind: str, sizes: Sizes) -> Build:
    types = {**_DOWN, "activations": _BYTES}
    build = Build("down_decode", down_int8, types, {"ASM": True}, 0, INT8)
    blocks = sizes.blocks
    return _down(build, kind, sizes)._replace(
        pass_weights=blocks.down_rows * blocks.down_units * UNIT,
        passes=-(-sizes.top_k * sizes.inner // (blocks.down_units * UNIT)),
    )


_DOWN = {**_SLOTS, "slot_ids": _INTS, "weights": _STATES, "output": _STATES}


def _down(build: Build, kind: str, sizes: Sizes) -> Build:
    """With what both kinds of activations have in common."""
    blocks = sizes.blocks
    constants = {
        "TOP_K": sizes.top_k,
        "DOWN": kind,
        "HIDDEN": sizes.hidden,
        "INNER": sizes.inner,
        "BLOCK_ROWS": blocks.down_rows,
        "BLOCK_UNITS": blocks.down_units,
        "BIASES": _epilogue(kind)["BIASES"],
        **build.constants,
    }
    return build._replace(
        constants=constants,
        warps=blocks.down_warps,
        weights=blocks.down_rows * sizes.top_k * sizes.inner,
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


def _quantise() -> Build:
    """The kernel that brings activations to int8 at the start of a stage; of no type."""
    types = {"states": _STATES, "found": _BYTES}
    return Build("quantise", states.quantise, types, {"COLUMNS": HIDDEN, "GROUPS": 4}, 1, INT8)
