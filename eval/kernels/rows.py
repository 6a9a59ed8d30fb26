"""What the kernels of one type become on one kind of card, as rows of a table."""

from __future__ import annotations

from typing import Any, NamedTuple

from eval.kernels.catalogue import (
    LOOP_PASSES,
    Build,
    decode_builds,
    other_builds,
    repeated,
)
from eval.kernels.compiled import Code, compiled, disassembled, resources
from eval.kernels.sass import counted, listing
from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS

Row = dict[str, Any]

WARP = 32
"""Threads of a warp."""
ISSUED = 4
"""Instructions that a multiprocessor issues in a cycle, each for one warp."""


class Card(NamedTuple):
    """One card of a generation, as its vendor describes it."""

    name: str
    multiprocessors: int
    ghz: float
    """Boost clock."""
    gbps: float
    """Of its memory."""

    def share(self, instructions: float, size: float) -> float:
        """Most of the memory's speed that can be used with so many instructions a weight.

        Args:
            size: bytes of a weight.
        """
        weights_per_ns = self.multiprocessors * ISSUED * WARP * self.ghz / instructions
        return min(1.0, weights_per_ns * size / self.gbps)


CARDS = {
    80: Card("A100 80 GB", 108, 1.41, 2039.0),
    90: Card("H200", 132, 1.98, 4800.0),
    120: Card("RTX 5090", 170, 2.41, 1792.0),
}
"""Compute capability -> a card that has it."""


class Job(NamedTuple):
    """What one process does at a time."""

    kind: str
    arch: int
    decode_only: bool = False


def rows(job: Job) -> list[Row]:
    """A row for each kernel; instructions are counted for decode alone."""
    kind, arch, decode_only = job
    once, looped = repeated(kind, 1), repeated(kind, LOOP_PASSES)
    found = []
    for variants in zip(decode_builds(kind), once, looped, strict=True):
        found.append(_counted(kind, arch, *variants))
    if not decode_only:
        for build in other_builds(kind):
            found.append(_row(kind, build, compiled(build, arch)))
    return found


def _counted(kind: str, arch: int, build: Build, once: Build, looped: Build) -> Row:
    """A decode kernel's row."""
    code = compiled(build, arch)
    single = code if build.passes == 1 else compiled(once, arch)
    listings = [
        listing(disassembled(each.cubin)) for each in (code, single, compiled(looped, arch))
    ]
    program, alone, several = listings
    threads = build.warps * WARP
    size = FORMATS[kind].block_bytes / FORMATS[kind].values
    row = _row(kind, build, code)
    try:
        count = counted(program, alone, several, build.passes)
    except ValueError as problem:
        return {**row, "bytes_per_weight": size, "note": str(problem)}
    whole = count.whole * threads / build.weights
    more = {
        "bytes_per_weight": size,
        "instructions_per_weight": whole,
        "loop_per_weight": count.loop * threads / build.pass_weights,
        "passes": build.passes,
        "note": count.note,
    }
    if arch in CARDS:
        more["memory_share_at_most"] = CARDS[arch].share(whole, size)
    return {**row, **more}


def _row(kind: str, build: Build, code: Code) -> Row:
    """What is told of every kernel."""
    registers, spilled = resources(code.cubin)
    return {
        "arch": f"sm_{code.arch}",
        "type": kind,
        "stage": build.stage,
        "activations": build.activations,
        "registers": registers,
        "spilled_bytes": spilled,
    }
