"""What the device kernels must compute right: types, shapes, tiles and numbers of tokens.

The tests and `eval.gpu_check` run the same cases, with `eval.kernel_cases.runs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from eval.kernel_cases.shapes import (
    LINEAR_SHAPES,
    MODEL_SHAPES,
    ODD_SHAPES,
    SMALL_SHAPES,
    TYPE_SHAPES,
    TYPES,
    Shape,
)
from eval.models.blocks import block_values
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import PLANES, slot_layout
from hybrimoe_plugin.compute.gpu.kernels.tuning import candidates

TOKENS = (1, 2, 20, 96)
"""One token, a small decode batch (both take the decode kernels), and prompts in small and large
tiles.
"""

LARGE = Blocks(256, 4, 256, 2, tokens=16, rows=256)
"""For the interpreter, which takes as long for a small tile as for a large one. The product never
takes it: on a GPU it spills registers.
"""

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative RMS error. Sums are float32 everywhere. With bfloat16 states, prefill rounds
weights, activations and each expert's part to steps of 2^-8, and decode the output: about 3e-3
together.
"""
SUMMED_IN_ORDER = 1e-5
"""For float32 prompts on a GPU: one sum runs over up to 14336 columns, whose rounding grows with
their root.
"""


@dataclass(frozen=True)
class Case:
    """One call of the expert kernels."""

    shape: Shape
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    blocks: Blocks | None = None
    """Tiles; None for those that the product takes for this shape."""
    limit: float = 0.0
    """The error must be below; 0 chooses it by dtype."""
    routing: torch.dtype | None = None
    """Of the routing weights; None for what the model's router gives."""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        kinds = "/".join(self.shape.kinds)
        name = f"{self.shape.name} {kinds} T={self.tokens} {_short(self.dtype)}"
        if self.blocks is not None:
            name += " tiles " + "-".join(map(str, self.blocks))
        own = self.dtype if self.shape.rounded_routing else torch.float32
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "limit", self.limit or LIMITS[self.dtype])
        object.__setattr__(self, "routing", self.routing or own)


@dataclass(frozen=True)
class LinearCase:
    """One call of the kernels for a dense linear."""

    model: str
    kind: str
    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def limit(self) -> float:
        """The error must be below."""
        return LIMITS[self.dtype]

    @property
    def name(self) -> str:
        """The case in words."""
        size = f"{self.rows}x{self.columns}"
        return f"{self.model} {size} {self.kind} T={self.tokens} {_short(self.dtype)}"


class RepackCase(NamedTuple):
    """A matrix whose blocks are split into planes on arrival."""

    kind: str
    blocks: int

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.kind}, {self.blocks} blocks"


def cases(interpreted: bool) -> list[Case]:
    """Every case of the expert kernels.

    Args:
        interpreted: what Triton's interpreter can do in a minute (small shapes, float32 mostly),
            instead of what a GPU must do (the models' own shapes). Both in the tiles that the
            product takes for a shape.
    """
    return _interpreted_cases() if interpreted else _device_cases()


def odd_cases(interpreted: bool) -> list[Case]:
    """Shapes that no model has.

    `cases` holds them for a GPU; the interpreter takes another minute for them.
    """
    found = []
    for shape in ODD_SHAPES:
        for tokens in (2, 24):
            if interpreted:
                found.append(Case(shape, tokens, torch.float32, LARGE))
            else:
                found += [Case(shape, tokens, dtype) for dtype in LIMITS]
    return found


def candidate_cases(shapes: Sequence[Shape] = MODEL_SHAPES[:2]) -> list[Case]:
    """Decode in every tile that tuning may choose: 12 of each kernel for each shape.

    Routing weights are float32, as in tuning itself.
    """
    found = []
    for shape in shapes:
        first = Blocks.of(slot_layout(shape.spec, planar=True), shape.top_k)
        for blocks in candidates(first):
            found.append(Case(shape, 1, blocks=blocks, routing=torch.float32))
    return found


def linear_cases(interpreted: bool = False) -> list[LinearCase]:
    """Every case of the dense linears."""
    found = []
    if interpreted:
        for kind in TYPES:
            for tokens in (1, 20):
                found.append(LinearCase("small", kind, 80, 256, tokens, torch.float32))
        return found
    for model, rows, columns, kinds in LINEAR_SHAPES:
        # A head computes the last token's logits alone, or those of a few.
        counts = TOKENS if rows < 30000 else (1, 2)
        for kind in kinds:
            found += [LinearCase(model, kind, rows, columns, tokens) for tokens in counts]
        found += [LinearCase(model, kind, rows, columns, 1, torch.float32) for kind in kinds]
    return found


def repack_cases(interpreted: bool = False) -> list[RepackCase]:
    """Every case of splitting blocks into planes.

    67 blocks are no whole number of the kernel's programs; the others are a matrix of each model.
    """
    matrices = () if interpreted else (2048 * 768, 2048 * 1408, 4096 * 14336)
    found = []
    for kind in (kind for kind in TYPES if kind in PLANES):
        blocks = [values // block_values(kind) for values in matrices]
        found += [RepackCase(kind, count) for count in (67, *blocks)]
    return found


def _interpreted_cases() -> list[Case]:
    """Small shapes of all types in float32, and one mixed shape in the smaller dtypes."""
    found = []
    for shape in SMALL_SHAPES:
        # Every program of a small tile costs the interpreter as much as one of a large tile.
        smaller = shape
        if block_values(shape.kinds[0]) <= 32:
            smaller = shape._replace(hidden=64, intermediate=96)
        found += [Case(smaller, tokens, torch.float32) for tokens in (1, 20)]
    mixed = Shape("small", ("Q4_K", "Q4_K", "Q6_K"), 256, 256, 4, 2)
    halves = (torch.bfloat16, torch.float16)
    return found + [Case(mixed, tokens, dtype, LARGE) for dtype in halves for tokens in (1, 12)]


def _device_cases() -> list[Case]:
    """Models' own shapes and all types, in the tiles that the product takes."""
    found = []
    for shape in (*MODEL_SHAPES, *TYPE_SHAPES):
        found += [Case(shape, tokens) for tokens in TOKENS]
        found += [Case(shape, 1, torch.float32), Case(shape, 2, torch.float16)]
    for shape in MODEL_SHAPES[:2]:
        found += [
            Case(shape, 20, torch.float32, limit=SUMMED_IN_ORDER),
            Case(shape, 96, torch.float16),
        ]
        found.append(Case(shape, 40))  # the middle one of the three sizes of prefill tiles
    return found + odd_cases(interpreted=False)


def _short(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[dtype]
