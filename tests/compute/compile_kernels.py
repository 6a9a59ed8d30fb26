"""Compile every kernel for NVIDIA GPUs that need not be there, and look at the code; run by
test_kernels.py for the H100's.

    python tests/compute/compile_kernels.py [--arch 80 90 100 120] [--types MXFP4 ...]

Qwen3-30B-A3B's shapes (`eval.kernels.catalogue`). No kernel may spill registers. Codes must be read
16 bytes at a time, and a thread must not load one scale over and over (160 loads where 10 do,
once); the numbers of loads that are allowed are those of compute capability 9.0, and only there
they are checked. Each line tells the loads of one or two bytes, those of 16, and the registers of a
thread.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from eval.kernels.catalogue import FLOAT, Build, decode_builds, other_builds
from eval.kernels.compiled import compiled, resources
from hybrimoe_plugin.compute.gpu.kernels.formats.description import GRIDS, SUPPORTED

LOADS = {
    "gate_up_decode": (12, 6),
    "down_decode": (8, 12),
    "gate_up_prefill": (12, 4),
    "down_prefill": (12, 2),
    "linear_decode": (12, 6),
    "linear_prefill": (12, 2),
}
"""Stage -> most loads of one or two bytes, fewest of 16, with activations in floating point."""
GRID_LOADS = (60, 4)
"""Codes of types with grids are loaded once for four or eight values, not in rows of 16 bytes."""

SPILLED = {(80, "gate_up_prefill IQ3_XXS"): 16, (80, "gate_up_prefill Q4_1"): 16}
"""Bytes of registers that a thread keeps in memory, where it is not 0 (docs/formats.md)."""


def check(build: Build, kind: str, arch: int) -> None:
    """The loads of a kernel, and no spills."""
    code = compiled(build, arch)
    ptx = code.ptx
    name = f"{build.stage} {kind}"
    if build.activations != FLOAT:
        name += f" {build.activations}"
    small = len(re.findall(r"ld\.global\.(?:\w+\.)*b(?:8|16) ", ptx))
    large = len(
        re.findall(r"ld\.global\.(?:\w+\.)*v4\.b32|cp\.async\.cg\.shared\.global .*0x10", ptx)
    )
    if arch == 90 and build.stage in LOADS and build.activations == FLOAT:
        narrow, wide = GRID_LOADS if kind in GRIDS else LOADS[build.stage]
        assert small <= narrow, f"{name}: {small} narrow loads"
        assert large >= wide, f"{name}: {large} wide loads"
    registers, spilled = resources(code.cubin)
    allowed = SPILLED.get((arch, name), 0)
    assert spilled <= allowed and "ld.local" not in ptx, f"{name}: {spilled} bytes spilled"
    print("ok", arch, name, small, large, registers, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--types", nargs="+", default=SUPPORTED, choices=SUPPORTED)
    asked = parser.parse_args(arguments)
    for arch in asked.arch:
        for kind in asked.types:
            for build in (*decode_builds(kind), *other_builds(kind)):
                check(build, kind, arch)


if __name__ == "__main__":
    main()
