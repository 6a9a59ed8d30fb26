"""Compile every kernel for NVIDIA GPUs that need not be there, and look at the code; run by
test_kernels.py for the H100's.

    python tests/compute/compile_kernels.py [--arch 80 90 100 120] [--types MXFP4 ...]

Qwen3-30B-A3B's shapes. No kernel may spill registers. Codes must be read 16 bytes at a time, and a
thread must not load one scale over and over (160 loads where 10 do, once); the numbers of loads
that are allowed are those of compute capability 9.0, and only there they are checked. Each line
tells the loads of one or two bytes, those of 16, and the registers of a thread.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hybrimoe_plugin.compute.gpu.kernels import decode, linear, prefill, repack
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.formats.description import GRIDS, SUPPORTED
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, PLANES, slot_layout
from hybrimoe_plugin.core import ExpertSpec

HIDDEN, INNER, TOP_K = 2048, 768, 8
STATES, BYTES, INTS = "*bf16", "*u8", "*i64"
TILES = {"order": INTS, "tile_slots": INTS, "tile_firsts": INTS, "tile_ends": INTS}
SWIGLU = {"BIASES": -1, "KIND": "silu", "ALPHA": 1.0, "LIMIT": 0.0, "UP_SHIFT": 0.0}
GPT_OSS = {"BIASES": 1 << 22, "KIND": "silu", "ALPHA": 1.702, "LIMIT": 7.0, "UP_SHIFT": 1.0}
"""The epilogue of the model that MXFP4 comes with."""

SPILLED = {(80, "gate_up_prefill IQ3_XXS"): 16, (80, "gate_up_prefill Q4_1"): 16}
"""Bytes of registers that a thread keeps in memory, where it is not 0 (docs/formats.md)."""


class Code(NamedTuple):
    """What a kernel became."""

    arch: int
    ptx: str
    cubin: bytes


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, arch: int
) -> Code:
    """One kernel's code; pointers and sizes are multiples of 16, as they are at run time."""
    names = kernel.arg_names
    types = {name: kind for name, kind in types.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in types
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("cuda", arch, 32)
    asm = triton.compile(source, target=target, options={"num_warps": warps}).asm
    return Code(arch, str(asm["ptx"]), asm["cubin"])


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of a thread that lie in memory instead)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found, told
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def check(name: str, code: Code, narrow: int, wide: int) -> None:
    """At most `narrow` loads of one or two bytes, at least `wide` of 16, and no spills."""
    ptx = code.ptx
    small = len(re.findall(r"ld\.global\.(?:\w+\.)*b(?:8|16) ", ptx))
    large = len(
        re.findall(r"ld\.global\.(?:\w+\.)*v4\.b32|cp\.async\.cg\.shared\.global .*0x10", ptx)
    )
    if name.endswith(GRIDS):
        # Their codes are loaded once for four or eight values, not in rows of 16 bytes.
        narrow, wide = 60, 4
    if code.arch == 90 and not name.startswith("blocks"):
        assert small <= narrow, f"{name}: {small} narrow loads"
        assert large >= wide, f"{name}: {large} wide loads"
    registers, spilled = resources(code.cubin)
    allowed = SPILLED.get((code.arch, name), 0)
    assert spilled <= allowed and "ld.local" not in ptx, f"{name}: {spilled} bytes spilled"
    print("ok", code.arch, name, small, large, registers, flush=True)


def check_type(kind: str, arch: int) -> None:
    """The kernels that compute one type."""
    spec = ExpertSpec(HIDDEN, INNER, 128, TOP_K, kind, kind, kind, 4096, 4096, 4096)
    sizes = Blocks.of(slot_layout(spec, planar=True), TOP_K)
    shape = {"HIDDEN": HIDDEN, "INNER": INNER}
    offsets = {
        "slots": BYTES,
        "tables": BYTES,
        "slot_bytes": "i64",
        "up_offset": "i32",
        "down_offset": "i32",
    }
    dot = {"BLOCK_TOKENS": sizes.tokens, "BLOCK_ROWS": sizes.rows, "DOT": tl.bfloat16}
    epilogue = GPT_OSS if kind == "MXFP4" else SWIGLU
    bias = {"BIASES": epilogue["BIASES"]}
    gate = {"TOP_K": TOP_K, "GATE": kind, "UP": kind, **epilogue}
    code = compiled(
        decode.gate_up_decode,
        {**offsets, "hidden": STATES, "slot_ids": INTS, "activations": "*fp32"},
        {**shape, **gate, "BLOCK_ROWS": sizes.gate_rows, "BLOCK_UNITS": sizes.gate_units},
        sizes.decode_warps,
        arch,
    )
    check(f"gate_up_decode {kind}", code, 12, 6)
    code = compiled(
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
        arch,
    )
    check(f"down_decode {kind}", code, 8, 12)
    states = {
        **offsets,
        **TILES,
        "hidden": STATES,
        "activations": STATES,
        "parts": STATES,
        "weights": STATES,
    }
    code = compiled(
        prefill.gate_up_prefill, states, {**shape, **gate, **dot}, sizes.prefill_warps, arch
    )
    check(f"gate_up_prefill {kind}", code, 12, 4)
    code = compiled(
        prefill.down_prefill,
        states,
        {**shape, "DOWN": kind, **dot, **bias},
        sizes.prefill_warps,
        arch,
    )
    check(f"down_prefill {kind}", code, 12, 2)
    matrix = {"states": STATES, "matrix": BYTES, "tables": BYTES, "output": STATES, "tokens": "i32"}
    size = {"KIND": kind, "ROWS": 4096, "COLUMNS": HIDDEN}
    code = compiled(
        linear.linear_decode, matrix, {**size, "BLOCK_ROWS": 4, "BLOCK_UNITS": 32}, 4, arch
    )
    check(f"linear_decode {kind}", code, 12, 6)
    code = compiled(linear.linear_prefill, matrix, {**size, **dot}, 4, arch)
    check(f"linear_prefill {kind}", code, 12, 2)


def check_repacking(kind: str, arch: int) -> None:
    """The kernel that splits a type's blocks into planes."""
    planes = PLANES[kind]
    word, pointer = (1, BYTES) if BLOCK_BYTES[kind] % 2 else (2, "*i16")
    constants = {
        "BLOCK_WORDS": BLOCK_BYTES[kind] // word,
        "OFFSETS": tuple(at // word for at, _ in planes),
        "WORDS": tuple(count // word for _, count in planes),
        "PER_PROGRAM": 32,
    }
    code = compiled(
        repack.blocks_to_planes,
        {"source": pointer, "target": pointer, "blocks": "i32"},
        constants,
        4,
        arch,
    )
    check(f"blocks_to_planes {kind}", code, 0, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--types", nargs="+", default=SUPPORTED, choices=SUPPORTED)
    asked = parser.parse_args(arguments)
    for arch in asked.arch:
        for kind in asked.types:
            check_type(kind, arch)
        for kind in asked.types:
            if kind in PLANES:
                check_repacking(kind, arch)


if __name__ == "__main__":
    main()
