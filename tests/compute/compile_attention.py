"""Compile decode attention for NVIDIA GPUs that need not be there; run by test_split_attention.py.

    python tests/compute/compile_attention.py [--arch 80 90 120]

What is compiled is what `SplitAttention` launches. No register may lie in memory, a program may
have no more shared memory than the smallest of these GPUs has, and rows must be copied 16 bytes at
a time. A line tells the registers of a thread, the KiB of shared memory of a program and, of the
kernel that reads the cache, the instructions of its loop for each value of keys and values, which
all threads together spend.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from eval.kernels.compiled import disassembled, resources
from eval.kernels.sass import listing
from hybrimoe_plugin.compute.attention import split_attention
from hybrimoe_plugin.compute.attention.decode_attention import AttentionShape, GQAShape, MLAShape
from hybrimoe_plugin.compute.attention.split_attention import SplitAttention, Tiles
from hybrimoe_plugin.compute.attention.split_keys import attend_ranges, combine_ranges
from hybrimoe_plugin.compute.gpu.kernels.linear import dot_type

SHARED = 99 << 10
"""Bytes of shared memory that a program may have on the smallest of these GPUs (sm_120)."""
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
SHAPES = {
    "Qwen3-30B-A3B": GQAShape(32, 4, 128, 4096, torch.bfloat16, 0.1),
    "Mixtral-8x7B": GQAShape(32, 8, 128, 4096, torch.bfloat16, 0.1),
    "heads of 64": GQAShape(32, 8, 64, 4096, torch.float16, 0.1),
    "heads of 80": GQAShape(32, 32, 80, 4096, torch.bfloat16, 0.1),
    "heads of 256": GQAShape(16, 4, 256, 4096, torch.bfloat16, 0.1),
    "heads of 256, float32": GQAShape(16, 4, 256, 4096, torch.float32, 0.1),
    "DeepSeek-V2-Lite": MLAShape(16, 512, 64, 4096, torch.bfloat16, 0.1),
    "DeepSeek-V3": MLAShape(128, 512, 64, 4096, torch.bfloat16, 0.1),
}


class Launches:
    """In a kernel's place: notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        return self._note

    def _note(self, *arguments: Any, **options: Any) -> None:
        self.arguments = arguments
        self.options = options

    def compiled(self, arch: int) -> Any:
        """The kernel for such arguments; pointers and strides of whole 16 bytes are told so."""
        names = self.kernel.arg_names
        constants = {name for name in names if self.kernel.fn.__annotations__.get(name)}
        signature, attributes, values = {}, {}, {}
        for place, (name, given) in enumerate(zip(names, self.arguments, strict=True)):
            if name in constants:
                signature[name] = "constexpr"
                values[(place,)] = given
                continue
            signature[name] = _type(given)
            whole = isinstance(given, torch.Tensor) or given % 16 == 0
            if whole and name not in self.kernel.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, values, attributes)
        target = GPUTarget("cuda", arch, 32)
        return triton.compile(source, target=target, options=self.options)


def _type(given: Any) -> str:
    if isinstance(given, torch.Tensor):
        return POINTERS[given.dtype]
    return "fp32" if isinstance(given, float) else "i32"


def launches(shape: AttentionShape) -> list[Launches]:
    """What computes a shape on a GPU: the launch over ranges, and the one that combines them."""
    kernels = [Launches(attend_ranges), Launches(combine_ranges)]
    patched = {"attend_ranges": kernels[0], "combine_ranges": kernels[1], "dot_type": _dot_type}
    meta = torch.device("meta")
    with mock.patch.multiple(split_attention, **patched):
        position = torch.zeros(1, dtype=torch.int64, device=meta)
        SplitAttention(shape, meta, position, ranges=64)(*shape.example(meta))
    return kernels


def _dot_type(dtype: torch.dtype, interpreted: bool) -> Any:
    return dot_type(dtype, interpreted=False)


def check(name: str, shape: AttentionShape, arch: int) -> None:
    """Both kernels of a shape."""
    attend, combine = launches(shape)
    for launch in (attend, combine):
        code = launch.compiled(arch)
        registers, spilled = resources(code.asm["cubin"])
        shared = code.metadata.shared
        assert spilled == 0, f"{name}: {spilled} bytes spilled"
        assert shared <= SHARED, f"{name}: {shared} bytes of shared memory"
        told = ""
        if launch is attend:
            wide = len(re.findall(r"cp\.async\.cg\.shared\.global", code.asm["ptx"]))
            assert wide, f"{name}: rows are not copied 16 bytes at a time"
            told = f"{_instructions(shape, code):.2f}"
        print("ok", arch, launch.kernel.__name__, name, registers, shared >> 10, told, flush=True)


def _instructions(shape: AttentionShape, code: Any) -> float:
    """Of all threads together, in the longest loop, for each value that a tile holds."""
    widths = shape.widths
    tile = Tiles.of(widths, shape.dtype).tokens * (widths.main + widths.rest + widths.values)
    threads = 32 * code.metadata.num_warps
    loops = listing(disassembled(code.asm["cubin"])).loops
    assert loops, "no loop found"
    return len(loops[0]) * threads / tile


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    asked = parser.parse_args(arguments)
    for arch in asked.arch:
        for name, shape in SHAPES.items():
            check(name, shape, arch)


if __name__ == "__main__":
    main()
