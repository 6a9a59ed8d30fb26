"""Compile a kernel for a GPU that need not be there, and take its code apart."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eval.kernels.catalogue import Build


class Code(NamedTuple):
    """What a kernel became."""

    arch: int
    """Compute capability, 90 for an H100."""
    ptx: str
    cubin: bytes


class Resources(NamedTuple):
    """What a thread takes."""

    registers: int
    spilled: int
    """Bytes of a thread that lie in memory because there are no registers left for them."""


def compiled(build: Build, arch: int) -> Code:
    """One kernel's code; pointers and sizes are multiples of 16, as they are at run time."""
    names = build.kernel.arg_names
    types = {name: kind for name, kind in build.types.items() if name in names}
    constants = build.constants
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in types
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(build.kernel, signature, values, attributes)
    target = GPUTarget("cuda", arch, 32)
    asm = triton.compile(source, target=target, options={"num_warps": build.warps}).asm
    return Code(arch, str(asm["ptx"]), asm["cubin"])


def resources(cubin: bytes) -> Resources:
    """Registers and spills of the only kernel in it."""
    told = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found, told
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack + local)


def disassembled(cubin: bytes) -> str:
    """The card's own instructions (SASS), with labels."""
    return _tool(triton.knobs.nvidia.nvdisasm.path, "--print-code", cubin)


def _tool(path: Any, flag: str, cubin: bytes) -> str:
    """What one of the programs that come with Triton says of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(path), flag, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
