"""Compile every kernel for an NVIDIA GPU that need not be there, and look at the code; run by
test_kernels.py.

Qwen3-30B-A3B's shapes. Codes must be read 16 bytes at a time, the decode loops must not spill, and
a thread must not load one scale over and over (160 loads where 10 do, once).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hybrimoe_plugin.compute.gpu.kernels import decode, linear, prefill, repack
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.formats.description import SUPPORTED
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, PLANES, slot_layout
from hybrimoe_plugin.core import ExpertSpec

HIDDEN, INNER, TOP_K = 2048, 768, 8
STATES, BYTES, INTS = "*bf16", "*u8", "*i64"
TILES = {"order": INTS, "tile_slots": INTS, "tile_firsts": INTS, "tile_ends": INTS}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    """PTX of one kernel; pointers and sizes are multiples of 16, as they are at run time."""
    names = kernel.arg_names
    types = {name: kind for name, kind in types.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in types
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return str(
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm[
            "ptx"
        ]
    )


def check(name: str, ptx: str, narrow: int, wide: int) -> None:
    """At most `narrow` loads of one or two bytes, at least `wide` of 16."""
    small = len(re.findall(r"ld\.global\.(?:\w+\.)*b(?:8|16) ", ptx))
    large = len(
        re.findall(r"ld\.global\.(?:\w+\.)*v4\.b32|cp\.async\.cg\.shared\.global .*0x10", ptx)
    )
    assert small <= narrow, f"{name}: {small} narrow loads"
    assert large >= wide, f"{name}: {large} wide loads"
    assert "ld.local" not in ptx, f"{name}: spills"
    print("ok", name, small, large)


def main() -> None:
    for kind in SUPPORTED:
        spec = ExpertSpec(HIDDEN, INNER, 128, TOP_K, kind, kind, kind, 4096, 4096, 4096)
        sizes = Blocks.of(slot_layout(spec, planar=True), TOP_K)
        shape = {"HIDDEN": HIDDEN, "INNER": INNER}
        offsets = {"slots": BYTES, "slot_bytes": "i64", "up_offset": "i32", "down_offset": "i32"}
        dot = {"BLOCK_TOKENS": sizes.tokens, "BLOCK_ROWS": sizes.rows, "DOT": tl.bfloat16}
        bias = {"BIASES": -1}
        swiglu = {**bias, "KIND": "silu", "ALPHA": 1.0, "LIMIT": 0.0, "UP_SHIFT": 0.0}
        gate = {"TOP_K": TOP_K, "GATE": kind, "UP": kind, **swiglu}
        ptx = compiled(
            decode.gate_up_decode,
            {**offsets, "hidden": STATES, "slot_ids": INTS, "activations": "*fp32"},
            {**shape, **gate, "BLOCK_ROWS": sizes.gate_rows, "BLOCK_UNITS": sizes.gate_units},
            sizes.decode_warps,
        )
        check(f"gate_up_decode {kind}", ptx, 12, 6)
        ptx = compiled(
            decode.down_decode,
            {
                **offsets,
                "activations": "*fp32",
                "slot_ids": INTS,
                "weights": STATES,
                "output": STATES,
            },
            {
                **shape,
                "TOP_K": TOP_K,
                "PLACES": 8,
                "DOWN": kind,
                **bias,
                "BLOCK_ROWS": sizes.down_rows,
                "BLOCK_UNITS": sizes.down_units,
            },
            sizes.down_warps,
        )
        check(f"down_decode {kind}", ptx, 8, 12)
        states = {
            **offsets,
            **TILES,
            "hidden": STATES,
            "activations": STATES,
            "parts": STATES,
            "weights": STATES,
        }
        ptx = compiled(
            prefill.gate_up_prefill, states, {**shape, **gate, **dot}, sizes.prefill_warps
        )
        check(f"gate_up_prefill {kind}", ptx, 12, 4)
        ptx = compiled(
            prefill.down_prefill,
            states,
            {**shape, "DOWN": kind, **dot, **bias},
            sizes.prefill_warps,
        )
        check(f"down_prefill {kind}", ptx, 12, 2)
        matrix = {"states": STATES, "matrix": BYTES, "output": STATES, "tokens": "i32"}
        size = {"KIND": kind, "ROWS": 4096, "COLUMNS": HIDDEN}
        ptx = compiled(
            linear.linear_decode, matrix, {**size, "BLOCK_ROWS": 4, "BLOCK_UNITS": 32}, 4
        )
        check(f"linear_decode {kind}", ptx, 12, 6)
        ptx = compiled(linear.linear_prefill, matrix, {**size, **dot}, 4)
        check(f"linear_prefill {kind}", ptx, 12, 2)
    for kind, planes in PLANES.items():
        constants = {
            "BLOCK_WORDS": BLOCK_BYTES[kind] // 2,
            "OFFSETS": tuple(at // 2 for at, _ in planes),
            "WORDS": tuple(count // 2 for _, count in planes),
            "PER_PROGRAM": 32,
        }
        ptx = compiled(
            repack.blocks_to_planes,
            {"source": "*i16", "target": "*i16", "blocks": "i32"},
            constants,
            4,
        )
        check(f"blocks_to_planes {kind}", ptx, 10**4, 0)


if __name__ == "__main__":
    main()
