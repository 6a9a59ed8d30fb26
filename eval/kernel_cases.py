"""What the device kernels must compute right: the types, shapes, tiles and numbers of tokens that
the product uses.

The tests and `eval.gpu_check` run the same cases. Each fills slots through the product's own
repacking, calls the kernels as the product does, and compares with a float64 reference that is
computed on the same device from the stored bytes by `experts.dequant`. Memory that nobody has
written reads as NaN: slots' gaps and spare slots because they are filled with 0xFF, activations and
outputs by torch's own `fill_uninitialized_memory`.

    for case in cases(interpreted=False):
        error = run_case(case, product_kernels(case, device), device)
        assert error < case.limit
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.compute.gpu.kernels.base import Kernels, SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import (
    BLOCK_BYTES,
    PLANES,
    Part,
    slot_layout,
    to_planes,
)
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.kernels.tuning import candidates
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.weights.dequant import dequantize

TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "BF16", "F16")
"""All that have a Triton kernel; `kernels.formats.SUPPORTED` without importing Triton."""

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


class Shape(NamedTuple):
    """Experts of one kind of layer."""

    name: str
    kinds: tuple[str, str, str]
    """GGML types of gate, up and down."""
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    rounded_routing: bool = False
    """Whether this model's router gives routing weights in the states' dtype; else they are
    float32.
    """

    @property
    def spec(self) -> ExpertSpec:
        inner, outer = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        sizes = [
            stored_bytes(kind, *shape)
            for kind, shape in zip(self.kinds, (inner, inner, outer), strict=True)
        ]
        return ExpertSpec(
            self.hidden, self.intermediate, self.experts, self.top_k, *self.kinds, *sizes
        )


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
        tiles = "" if self.blocks is None else " tiles " + "-".join(map(str, self.blocks))
        name = (
            f"{self.shape.name} {'/'.join(self.shape.kinds)} T={self.tokens} "
            f"{_short(self.dtype)}{tiles}"
        )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "limit", self.limit or LIMITS[self.dtype])
        own = self.dtype if self.shape.rounded_routing else torch.float32
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
        return (
            f"{self.model} {self.rows}x{self.columns} {self.kind} T={self.tokens} "
            f"{_short(self.dtype)}"
        )


class RepackCase(NamedTuple):
    """A matrix whose blocks are split into planes on arrival."""

    kind: str
    blocks: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.blocks} blocks"


# As the models' usual GGUF files have them. 1408 columns are no whole number of K blocks (256):
# such files keep these matrices in Q5_0, which the torch kernels compute, or Q8_0. 1536 is what
# eval.shapes pads them to.
MODEL_SHAPES = (
    Shape("Qwen3-30B-A3B", ("Q4_K", "Q4_K", "Q4_K"), 2048, 768, 12, 8, True),
    Shape("Qwen3-30B-A3B", ("Q4_K", "Q4_K", "Q6_K"), 2048, 768, 12, 8, True),
    Shape("DeepSeek-V2-Lite", ("Q4_K", "Q4_K", "Q8_0"), 2048, 1408, 10, 6),
    Shape("DeepSeek-V2-Lite", ("Q8_0", "Q8_0", "Q8_0"), 2048, 1408, 10, 6),
    Shape("DeepSeek-V2-Lite", ("Q4_K", "Q4_K", "Q5_0"), 2048, 1408, 10, 6),
    Shape("DeepSeek-V2-Lite, padded", ("Q4_K", "Q4_K", "Q4_K"), 2048, 1536, 10, 6),
    Shape("DeepSeek-V2-Lite, padded", ("Q4_K", "Q4_K", "Q6_K"), 2048, 1536, 10, 6),
    Shape("Mixtral-8x7B", ("Q4_K", "Q4_K", "Q4_K"), 4096, 14336, 8, 2),
    Shape("Mixtral-8x7B", ("Q4_K", "Q4_K", "Q6_K"), 4096, 14336, 8, 2),
)
TYPE_SHAPES = tuple(
    Shape("every type", (kind,) * 3, 2048, 768, 12, 8) for kind in TYPES if kind != "Q4_K"
)

SMALL_SHAPES = tuple(Shape("small", (kind,) * 3, 256, 256, 3, 2) for kind in TYPES)
ODD_SHAPES = (
    Shape("odd", ("Q4_K", "Q5_K", "Q8_0"), 256, 320, 4, 2),
    Shape("odd", ("Q8_0", "Q4_0", "Q6_K"), 576, 256, 2, 2),
    Shape("odd", ("Q8_0", "Q8_0", "Q4_0"), 96, 160, 5, 1),
    Shape("odd", ("Q4_K", "Q4_K", "Q6_K"), 256, 1536, 2, 2),
    Shape("odd", ("BF16", "F16", "Q5_K"), 64, 512, 4, 3),
)
"""Half units, K = E, one expert for each token, and experts that no token wants."""

# (rows, columns, types) of attention, of a dense MLP and of the head.
LINEAR_SHAPES = (
    ("Qwen3-30B-A3B", 4096, 2048, ("Q4_K",)),
    ("Qwen3-30B-A3B", 512, 2048, ("Q4_K", "Q6_K")),
    ("Qwen3-30B-A3B", 2048, 4096, ("Q4_K",)),
    ("Qwen3-30B-A3B", 151936, 2048, ("Q6_K",)),
    ("Qwen3-30B-A3B", 8192, 2048, ("Q6_K",)),
    ("DeepSeek-V2-Lite", 576, 2048, ("Q4_K", "Q8_0")),
    ("DeepSeek-V2-Lite", 4096, 512, ("Q4_K",)),
    ("DeepSeek-V2-Lite", 2048, 10944, ("Q8_0",)),
    ("Mixtral-8x7B", 4096, 4096, ("Q4_K", "Q8_0")),
    ("Mixtral-8x7B", 1024, 4096, ("Q8_0",)),
    ("Mixtral-8x7B", 32000, 4096, ("Q6_K",)),
    ("every type", 2048, 2048, ("Q5_K", "Q4_0", "BF16", "F16")),
)


def cases(interpreted: bool) -> list[Case]:
    """Every case of the expert kernels.

    Args:
        interpreted: what Triton's interpreter can do in a minute (small shapes, float32 mostly),
            instead of what a GPU must do (the models' own shapes). Both in the tiles that the
            product takes for a shape.
    """
    return _interpreted_cases() if interpreted else _device_cases()


def odd_cases(interpreted: bool) -> list[Case]:
    """Shapes that no model has; `cases` holds them for a GPU, and the interpreter takes another
    minute for them.
    """
    if interpreted:
        return [
            Case(shape, tokens, torch.float32, LARGE) for shape in ODD_SHAPES for tokens in (2, 24)
        ]
    return [
        Case(shape, tokens, dtype) for shape in ODD_SHAPES for tokens in (2, 24) for dtype in LIMITS
    ]


def candidate_cases(shapes: Sequence[Shape] = MODEL_SHAPES[:2]) -> list[Case]:
    """Decode in every tile that tuning may choose: 12 of each kernel for each shape.

    Routing weights are float32, as in tuning itself.
    """
    found = []
    for shape in shapes:
        first = Blocks.of(slot_layout(shape.spec, planar=True), shape.top_k)
        found += [
            Case(shape, 1, blocks=blocks, routing=torch.float32) for blocks in candidates(first)
        ]
    return found


def linear_cases(interpreted: bool = False) -> list[LinearCase]:
    """Every case of the dense linears."""
    if interpreted:
        return [
            LinearCase("small", kind, 80, 256, tokens, torch.float32)
            for kind in TYPES
            for tokens in (1, 20)
        ]
    found = []
    for model, rows, columns, kinds in LINEAR_SHAPES:
        # A head computes the last token's logits alone, or those of a few.
        counts = TOKENS if rows < 30000 else (1, 2)
        found += [
            LinearCase(model, kind, rows, columns, tokens) for kind in kinds for tokens in counts
        ]
        found += [LinearCase(model, kind, rows, columns, 1, torch.float32) for kind in kinds]
    return found


def repack_cases(interpreted: bool = False) -> list[RepackCase]:
    """67 blocks are no whole number of the kernel's programs; the others are a matrix of each
    model.
    """
    matrices = () if interpreted else (2048 * 768, 2048 * 1408, 4096 * 14336)
    elements = {kind: GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] for kind in PLANES}
    return [
        RepackCase(kind, count)
        for kind in PLANES
        for count in (67, *(n // elements[kind] for n in matrices))
    ]


def product_kernels(case: Case, device: torch.device) -> Kernels:
    """What the product computes these types with on a GPU: Triton's kernels, or torch's where those
    refuse.
    """
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    kernels = TritonKernels(device, case.blocks)
    return TorchKernels() if kernels.refusal(case.shape.spec) else kernels


def run_case(case: Case, kernels: Kernels, device: torch.device) -> float:
    """Relative RMS error of one call; NaN if anything was read that nobody had written.

    Expert 0 has no slot, so a pair in `top_k` or fewer is not computed here, as in the product. The
    others' slots are in another order than the experts.
    """
    shape = case.shape
    seed = case.tokens
    matrices = random_matrices(shape, seed, device)
    buffer, slot_of = fill(kernels, shape, matrices, device)
    hidden, ids, routing = random_call(shape, case.tokens, case.dtype, seed, device)
    routing = routing.to(case.routing)
    call = SlotCall(
        buffer, kernels.layout(shape.spec), _used(slot_of), hidden, slot_of[ids], routing
    )
    with poisoned():
        found = kernels.down(call, kernels.gate_up(call))
    assert found.dtype == case.dtype
    assert found.shape == hidden.shape
    return rms_error(found, reference(shape, matrices, hidden, ids, routing))


def run_linear(case: LinearCase, device: torch.device) -> float:
    """Relative RMS error of one dense linear; NaN if an output was not written."""
    from hybrimoe_plugin.compute.gpu.kernels.linear import linear

    generator = torch.Generator(device).manual_seed(case.tokens)
    stored = random_stored(case.kind, 1, case.rows, case.columns, generator)[0]
    planes = torch.from_numpy(to_planes(stored.cpu().numpy(), case.kind)).to(device)
    states = torch.randn(case.tokens, case.columns, generator=generator, device=device).to(
        case.dtype
    )
    with poisoned():
        found = linear(states, planes, case.kind, case.rows)
    assert found.dtype == case.dtype
    return rms_error(
        found, states.double() @ dequantize(stored, case.kind, (case.rows, case.columns)).double().T
    )


def run_repack(case: RepackCase, device: torch.device) -> int:
    """Bytes that differ from numpy's own splitting, those beside the target included: 0."""
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    size, beside = case.blocks * BLOCK_BYTES[case.kind], 256
    raw = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    room = torch.full((size + 2 * beside,), 0xFF, dtype=torch.uint8, device=device)
    part = Part(case.kind, 1, 1, 0, size, planar=True)
    TritonKernels(device).repack(
        part, torch.from_numpy(raw).to(device), room[beside : beside + size]
    )
    wanted = np.full(size + 2 * beside, 0xFF, np.uint8)
    wanted[beside : beside + size] = to_planes(raw, case.kind)
    return int(np.count_nonzero(room.cpu().numpy() != wanted))


# Parts of a case, which tests use alone.


def stored_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a matrix."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return rows * columns // block * size


_SCALES: dict[str, tuple[tuple[int, ...], float]] = {
    "Q4_K": ((0, 2), 300.0),
    "Q5_K": ((0, 2), 600.0),
    "Q6_K": ((208,), 1400.0),
    "Q8_0": ((0,), 74.0),
    "Q4_0": ((0,), 4.6),
    "Q4_1": ((0, 2), 9.0),
    "Q5_0": ((0,), 9.2),
    "Q5_1": ((0, 2), 18.0),
}
"""Type -> (bytes at which a block keeps float16 scales, since random ones would often not be
finite; codes' spread).
"""


def random_stored(
    kind: str, experts: int, rows: int, columns: int, generator: torch.Generator
) -> torch.Tensor:
    """Stored bytes [experts, bytes] uint8 of random matrices, on the generator's device.

    Scales are such that weights are of the order 1 / sqrt(columns).
    """
    device = generator.device
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        values = (
            torch.randn(experts, rows * columns, generator=generator, device=device) * columns**-0.5
        )
        return values.to(dtype).view(torch.uint8)
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    shape = (experts, stored_bytes(kind, rows, columns) // size, size)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    places, spread = _SCALES[kind]
    for at in places:
        scales = (
            torch.rand(shape[:2], generator=generator, device=device)
            .add_(0.5)
            .mul_(columns**-0.5 / spread)
        )
        blocks[:, :, at : at + 2] = scales.half()[..., None].view(torch.uint8)
    return blocks.flatten(1)


def random_matrices(
    shape: Shape, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored bytes of (gate, up, down), each [experts, bytes] uint8 on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    rows_columns = ((shape.intermediate, shape.hidden),) * 2 + ((shape.hidden, shape.intermediate),)
    gate, up, down = (
        random_stored(kind, shape.experts, rows, columns, generator)
        for kind, (rows, columns) in zip(shape.kinds, rows_columns, strict=True)
    )
    return gate, up, down


def fill(
    kernels: Kernels, shape: Shape, matrices: Sequence[torch.Tensor], device: torch.device
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
        for part, matrix in zip(layout, matrices, strict=True):
            target = buffer[int(slot_of[expert]), part.offset : part.offset + part.size]
            if part.planar:
                kernels.repack(part, matrix[expert].clone(), target)
            else:
                target.copy_(matrix[expert])
    return buffer, slot_of.to(device)


def random_call(
    shape: Shape, tokens: int, dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [T, H] of dtype, expert ids [T, K] int64, routing weights [T, K] float32) on the
    device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
    ids = (
        torch.rand(tokens, shape.experts, generator=generator, device=device)
        .topk(shape.top_k)
        .indices
    )
    return hidden, ids, torch.rand(tokens, shape.top_k, generator=generator, device=device)


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch allocates within is filled with NaN, so that a value nobody wrote cannot pass for
    a result.
    """
    settings: Any = torch.utils.deterministic
    was, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was, warn_only=warned)


def reference(
    shape: Shape,
    matrices: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    routing: torch.Tensor,
) -> torch.Tensor:
    """[T, H] float64 on hidden's device: what all experts but number 0 contribute, one after
    another.
    """
    output = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    inner, outer = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    for expert in range(1, shape.experts):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        gate, up, down = (
            dequantize(matrix[expert].clone(), kind, size).double()
            for matrix, kind, size in zip(matrices, shape.kinds, (inner, inner, outer), strict=True)
        )
        states = hidden[tokens].double()
        activations = torch.nn.functional.silu(states @ gate.T) * (states @ up.T)
        output.index_add_(
            0, tokens, activations @ down.T * routing[tokens, places].double()[:, None]
        )
    return output


def rms_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the difference, relative to what was wanted."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))


def _interpreted_cases() -> list[Case]:
    found = []
    for shape in SMALL_SHAPES:
        # Every program of a small tile costs the interpreter as much as one of a large tile.
        blocks_fit = shape.kinds[0].endswith("_K")
        smaller = shape if blocks_fit else shape._replace(hidden=64, intermediate=96)
        found += [Case(smaller, tokens, torch.float32) for tokens in (1, 20)]
    mixed = Shape("small", ("Q4_K", "Q4_K", "Q6_K"), 256, 256, 4, 2)
    halves = (torch.bfloat16, torch.float16)
    return found + [Case(mixed, tokens, dtype, LARGE) for dtype in halves for tokens in (1, 12)]


def _device_cases() -> list[Case]:
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


def _used(slot_of: torch.Tensor) -> tuple[int, ...]:
    return tuple(sorted(slot for slot in slot_of.tolist() if slot >= 0))


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
