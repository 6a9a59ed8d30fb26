"""The int8 decode kernels compile for a card, with and without the card's own instructions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hybrimoe_plugin.compute.gpu.kernels.formats.description import INTEGERS

pytest.importorskip("triton")

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.int8.decode import down_int8, gate_up_int8
from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
from hybrimoe_plugin.compute.gpu.kernels.int8.states import quantise
from hybrimoe_plugin.compute.gpu.kernels.layout import slot_layout
from hybrimoe_plugin.core import ExpertSpec

TYPES = {
    "hidden": "*u8", "activations": "*bf16", "slots": "*u8", "tables": "*u8", "slot_ids": "*i64",
    "slot_bytes": "i64", "up_offset": "i32", "down_offset": "i32", "weights": "*bf16",
    "output": "*bf16", "states": "*bf16", "found": "*u8",
}


def ptx(kernel, constants, asm, types=TYPES):
    names = kernel.arg_names
    constants = {"ASM": asm, **constants}
    constants = {name: constants[name] for name in names if name in constants}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name not in constants
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    return triton.compile(source, target=target, options={"num_warps": 1}).asm["ptx"]


def experts(kind):
    layout = slot_layout(ExpertSpec(2048, 768, 8, 8, kind, kind, kind, 4096, 4096, 4096), True)
    sizes = Int8Decode(True).blocks(layout, 8, Blocks.of(layout, 8))
    shape = {"HIDDEN": 2048, "INNER": 768, "TOP_K": 8, "BIASES": 4096}
    form = {"KIND": "silu", "ALPHA": 1.0, "LIMIT": 7.0, "UP_SHIFT": 1.0}
    rows, units = sizes.gate_rows, sizes.gate_units
    gate = {"GATE": kind, "UP": kind, "BLOCK_ROWS": rows, "BLOCK_UNITS": units}
    down = {"DOWN": kind, "BLOCK_ROWS": sizes.down_rows, "BLOCK_UNITS": sizes.down_units}
    states = {**TYPES, "activations": "*u8"}
    for asm in (True, False):
        codes = (
            ptx(gate_up_int8, {**shape, **form, **gate}, asm),
            ptx(down_int8, {**shape, **down}, asm, states),
        )
        for code in codes:
            assert ("dp4a" in code) == asm, kind
            assert "ld.local" not in code, kind


assert "div.rn.f32" in ptx(quantise, {"COLUMNS": 2048, "GROUPS": 4}, True)
for kind in sys.argv[2:]:
    experts(kind)
    print("ok", kind)
"""


def compile_for(arch: int, *kinds: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(arch), *kinds]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("ok") == len(kinds)


def test_two_types_compile() -> None:
    compile_for(90, "Q4_K", "IQ4_NL")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_every_type_compiles(arch: int) -> None:
    compile_for(arch, *INTEGERS)
