"""Decode kernels with int8 activations: right on this card, and faster than in floating point?

For each type the product's own proof runs (`kernels.int8.proof`): the card's instructions for
packed integers against plain arithmetic, to the bit, and both against the float kernels. Then the
share of the memory's speed that either kind of kernels reaches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from eval.gpu_bench import bandwidth
from eval.gpu_bench.bandwidth import Bandwidths
from eval.gpu_check.place import Place, Row
from eval.gpu_check.stages.bandwidth import SMALL, one_type, shares
from eval.kernel_cases.shapes import TYPES, Shape
from eval.models.routing import published_costs
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.formats.description import INTEGERS
from hybrimoe_plugin.compute.gpu.kernels.layout import slot_layout

USUAL = ("Q4_K", "Q8_0", "Q6_K", "MXFP4")
"""First."""
DRY_KIND, DRY_SIZE = "Q8_0", 64
"""The interpreter takes 20 seconds for 256 columns."""
TOP_K = 8


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    if place.dry:
        yield _proof(place, DRY_KIND)
        return
    kinds = sorted(TYPES, key=lambda kind: USUAL.index(kind) if kind in USUAL else len(USUAL))
    measured = bandwidth.bandwidths(published_costs(SMALL), 1.0, place.device)
    for kind in kinds:
        if kind in INTEGERS:
            yield _proof(place, kind)
        yield _shares(place, kind, measured)


def _proof(place: Place, kind: str) -> Row:
    """Whether the kernels of a type may take over here."""
    # Here, since they import Triton.
    from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
    from hybrimoe_plugin.compute.gpu.kernels.int8.proof import check
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    shape = Shape("tiny", (kind,) * 3, DRY_SIZE, DRY_SIZE, 2, 2)
    if not place.dry:
        shape = Shape(SMALL.name, (kind,) * 3, SMALL.hidden, SMALL.intermediate, TOP_K, TOP_K)
    layout = slot_layout(shape.spec, planar=True)
    buffer = torch.empty(shape.top_k, layout.size, dtype=torch.uint8, device=place.device)
    row: dict[str, object] = {"case": f"{kind}: int8 against plain arithmetic and floats"}
    if place.dry:
        row["missing"] = "a card: the interpreter has plain arithmetic alone"
    try:
        check(
            [(layout, shape.top_k)],
            buffer,
            TritonKernels(place.device),
            Int8Decode(asm=not place.dry),
        )
    except Exception as problem:  # what does not compile or launch shows in many ways
        return {**row, "ok": False, "detail": " ".join(str(problem).split())[:200]}
    return {**row, "ok": True}


def _shares(place: Place, kind: str, measured: Bandwidths) -> Row:
    """Shares with the tiles that follow from the shape: tuning compiles for long."""
    from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    weights = one_type(kind)
    spec = weights.spec
    layout = slot_layout(spec, planar=True)
    blocks = Blocks.of(layout, spec.top_k)
    link, kernel = shares(place, measured, weights, TritonKernels(place.device, blocks))
    row = {
        "case": f"{SMALL.name}, all {kind}",
        "expert_kb": spec.expert_bytes / 1e3,
        "link_share": link,
        "kernel_share": kernel,
    }
    if kind not in INTEGERS:
        return row
    blocks = Int8Decode(asm=True).blocks(layout, spec.top_k, blocks)
    int8 = TritonKernels(place.device, blocks, activations="int8")
    _, row["int8_share"] = shares(place, measured, weights, int8)
    return row
