"""Random weights, filled slots and calls for the device kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from eval.kernel_cases.shapes import Shape
from eval.models.blocks import block_bytes, stored_bytes
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels

_SCALES: dict[str, tuple[tuple[int, ...], float]] = {
    "Q4_K": ((0, 2), 300.0),
    "Q5_K": ((0, 2), 600.0),
    "Q6_K": ((208,), 1400.0),
    "Q8_0": ((0,), 74.0),
    "Q4_0": ((0,), 4.6),
    "Q4_1": ((0, 2), 9.0),
    "Q5_0": ((0,), 9.2),
    "Q5_1": ((0, 2), 18.0),
    "IQ4_NL": ((0,), 70.0),
    "IQ4_XS": ((0,), 1300.0),
    "Q2_K": ((80, 82), 18.0),
    "Q3_K": ((108,), 42.0),
    "IQ2_XXS": ((0,), 60.0),
    "IQ2_XS": ((0,), 60.0),
    "IQ2_S": ((0,), 60.0),
    "IQ3_XXS": ((0,), 130.0),
    "IQ3_S": ((0,), 140.0),
    "IQ1_S": ((0,), 7.0),
}
"""Type -> (bytes at which a block keeps float16 scales, since random ones would often not be
finite; codes' spread).
"""

_EXPONENTS = {"MXFP4": (0, 5.8)}
"""The same for types whose blocks keep an exponent byte: 128 is the scale 1."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def random_stored(
    kind: str,
    experts: int,
    rows: int,
    columns: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Stored bytes [experts, bytes] uint8 of random matrices, on the generator's device.

    Scales are such that weights are of the order 1 / sqrt(columns).
    """
    device = generator.device
    deviation = columns**-0.5
    if kind in _FLOATS:
        values = torch.randn(experts, rows * columns, generator=generator, device=device)
        values *= deviation
        return values.to(_FLOATS[kind]).view(torch.uint8)
    size = block_bytes(kind)
    count = stored_bytes(kind, rows * columns) // size
    shape = (experts, count, size)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    if kind in _EXPONENTS:
        at, spread = _EXPONENTS[kind]
        middle = 128 + round(math.log2(deviation / spread))
        drawn = torch.randint(-1, 2, (experts, count), generator=generator, device=device)
        blocks[:, :, at] = (middle + drawn).to(torch.uint8)
        return blocks.flatten(1)
    if kind == "IQ1_M":
        # Its float16 lies in the upper four bits of the last four words, lowest bits first.
        d = int(torch.full((1,), deviation / 7.0).half().view(torch.int16))
        for word in range(4):
            upper = d >> (4 * word) & 15
            blocks[:, :, 49 + 2 * word] = (blocks[:, :, 49 + 2 * word] & 15) | (upper << 4)
        return blocks.flatten(1)
    places, spread = _SCALES[kind]
    for at in places:
        drawn = torch.rand((experts, count), generator=generator, device=device)
        scales = (drawn + 0.5) * (deviation / spread)
        blocks[:, :, at : at + 2] = scales.half()[..., None].view(torch.uint8)
    return blocks.flatten(1)


def random_matrices(
    shape: Shape, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored bytes of (gate, up, down), each [experts, bytes] uint8 on the device."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    experts = shape.experts
    hidden, intermediate = shape.hidden, shape.intermediate
    gate_kind, up_kind, down_kind = shape.kinds
    gate = random_stored(gate_kind, experts, intermediate, hidden, generator)
    up = random_stored(up_kind, experts, intermediate, hidden, generator)
    down = random_stored(down_kind, experts, hidden, intermediate, generator)
    return gate, up, down


def fill(
    kernels: Kernels,
    shape: Shape,
    matrices: Sequence[torch.Tensor],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots [E + 1, slot bytes] uint8, expert -> slot [E] int64), all but expert 0 in slots.

    Experts lie in reverse order; what no expert owns is 0xFF, which is NaN in each floating-point
    type.
    """
    layout = kernels.layout(shape.spec)
    buffer = torch.full((shape.experts + 1, layout.size), 0xFF, dtype=torch.uint8, device=device)
    slot_of = torch.arange(shape.experts, 0, -1)
    slot_of[0] = -1
    for expert in range(1, shape.experts):
        slot = buffer[int(slot_of[expert])]
        for part, matrix in zip(layout.parts, matrices, strict=True):
            target = slot[part.offset : part.offset + part.size]
            if part.planar:
                kernels.repack(part, matrix[expert].clone(), target)
            else:
                target.copy_(matrix[expert])
    return buffer, slot_of.to(device)


def random_call(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random call of the kernels.

    Returns:
        (hidden [T, H] of dtype, expert ids [T, K] int64, routing weights [T, K] float32) on the
        device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
    scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
    ids = scores.topk(shape.top_k).indices
    routing = torch.rand(tokens, shape.top_k, generator=generator, device=device)
    return hidden, ids, routing
