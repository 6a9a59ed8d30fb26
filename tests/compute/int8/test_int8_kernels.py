"""Decode kernels for int8 activations, in the interpreter and compiled for cards."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from eval.kernel_cases.data import fill, random_call, random_matrices
from eval.kernel_cases.reference import poisoned, reference, rms_error
from eval.kernel_cases.shapes import ODD_SHAPES, TYPES, Shape
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels, SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS, INTEGERS
from hybrimoe_plugin.compute.gpu.kernels.formats.facts import points_start
from hybrimoe_plugin.compute.gpu.kernels.formats.tables import point_tables
from hybrimoe_plugin.compute.gpu.kernels.int8.activations import int8_codes
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels

pytest.importorskip("triton")
from hybrimoe_plugin.compute.gpu.kernels.int8.arithmetic import INTERLEAVE, LOOK_UP
from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
from hybrimoe_plugin.compute.gpu.kernels.int8.states import padded
from hybrimoe_plugin.compute.gpu.kernels.layout import slot_layout
from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
LARGE = Blocks(256, 8, 256, 8, 1, 1, tokens=16, rows=256)
"""For the interpreter, which takes as long for a small tile as for a large one."""
KNOWN = [kind for kind in TYPES if kind in INTEGERS]
ODD = [shape for shape in ODD_SHAPES if set(shape.kinds) & set(INTEGERS)]


def computed(kernels: Kernels, shape: Shape, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, H] of random experts, of which expert 0 has no slot."""
    buffer, slot_of = fill(kernels, shape, random_matrices(shape, 1, DEVICE), DEVICE)
    hidden, ids, routing = random_call(shape, tokens, dtype, 1, DEVICE)
    used = tuple(sorted(slot for slot in slot_of.tolist() if slot >= 0))
    layout = kernels.layout(shape.spec)
    call = SlotCall(buffer, layout, used, hidden, slot_of[ids], routing)
    with poisoned():
        return kernels.down(call, kernels.gate_up(call))


def check(shape: Shape, tokens: int, dtype: torch.dtype, limit: float) -> None:
    """The kernels see activations as `quantise_activations` says and add nothing to that."""
    blocks = LARGE if INTERPRETED else None
    found = computed(TritonKernels(DEVICE, blocks, activations="int8"), shape, tokens, dtype)
    emulated = computed(TorchKernels(int8=True), shape, tokens, dtype)
    assert rms_error(found, emulated.double()) < limit


@pytest.mark.parametrize("kind", KNOWN)
def test_every_type_equals_the_emulation(kind: str) -> None:
    sizes = (256, 256) if FORMATS[kind].values == 256 else (64, 96)
    check(Shape("small", (kind,) * 3, *sizes, 3, 2), 1, torch.float32, 2e-6)


@pytest.mark.parametrize("shape", ODD, ids=lambda shape: "/".join(shape.kinds))
def test_odd_shapes_and_mixed_types_equal_the_emulation(shape: Shape) -> None:
    check(shape, 1, torch.float32, 2e-6)


def test_narrow_states_equal_the_emulation() -> None:
    shape = Shape("small", ("Q4_K", "Q4_K", "Q6_K"), 256, 512, 4, 2)
    for dtype in (torch.bfloat16, torch.float16):
        check(shape, 2, dtype, 1e-2)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_products_own_tiles(rows: int) -> None:
    """Rows that are no whole number of programs, columns that are no whole number of passes."""
    shape = Shape("small", ("Q8_0", "Q8_0", "Q4_0"), 96, 160, 3, 2)
    own = Int8Decode(asm=False).blocks(slot_layout(shape.spec, True), 2, LARGE)
    blocks = own._replace(gate_rows=rows * 16, down_rows=rows * 16, gate_units=1, down_units=2)
    found = computed(TritonKernels(DEVICE, blocks, activations="int8"), shape, 1, torch.float32)
    emulated = computed(TorchKernels(int8=True), shape, 1, torch.float32)
    assert rms_error(found, emulated.double()) < 2e-6


def test_error_against_float64_is_that_of_int8() -> None:
    shape = Shape("small", ("Q4_K", "Q4_K", "Q6_K"), 256, 256, 4, 2)
    kernels = TritonKernels(DEVICE, LARGE, activations="int8")
    found = computed(kernels, shape, 2, torch.float32)
    hidden, ids, routing = random_call(shape, 2, torch.float32, 1, DEVICE)
    wanted = reference(shape, random_matrices(shape, 1, DEVICE), hidden, ids, routing)
    assert 1e-3 < rms_error(found, wanted) < 2e-2


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
@pytest.mark.parametrize("columns", [32, 96, 256])
def test_codes_scales_and_sums_lie_where_kernels_read_them(columns: int) -> None:
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    values[0, :32] = 0
    values[1, 5] = float("nan")
    values[2, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    values = values.to(DEVICE)
    codes, scales = int8_codes(values)
    with poisoned():
        stored = Int8Decode(asm=False).states(values)
    wide = padded(columns)
    ends = [0, wide, wide * 9 // 8, wide * 11 // 8]
    found, steps, sums = (
        stored[:, first:last].contiguous().view(dtype)
        for first, last, dtype in zip(
            ends, ends[1:], (torch.int8, torch.float32, torch.int32), strict=False
        )
    )
    assert torch.equal(found[:, :columns], codes)
    assert not found[:, columns:].any()
    count = columns // 32
    torch.testing.assert_close(steps[:, :count], scales, rtol=0, atol=0, equal_nan=True)
    assert not steps[:, count:].any()
    wanted = found.int().unflatten(1, (-1, 16)).sum(-1)
    assert torch.equal(sums.long(), wanted)


def prmt(first: int, second: int, selector: int) -> int:
    """PTX's byte permutation in its default mode."""
    both = (first | second << 32).to_bytes(8, "little")
    picked = []
    for place in range(4):
        nibble = selector >> (4 * place) & 15
        byte = both[nibble & 7]
        picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def lop3(first: int, second: int, third: int, table: int) -> int:
    """PTX's function of three bits, bit by bit."""
    found = 0
    for bit in range(32):
        at = (first >> bit & 1) << 2 | (second >> bit & 1) << 1 | (third >> bit & 1)
        found |= (table >> at & 1) << bit
    return found


OPERATIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda first, second: first & second,
    "shr.u32": lambda first, second: first >> second,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
}


def run_ptx(program: str, inputs: dict[str, int]) -> tuple[int, int]:
    """What the program makes of words in its operands."""
    registers = dict(inputs)
    for name, operands in re.findall(r"([a-z0-9]+\.[bu]32) ([^;]*);", program):
        if name in OPERATIONS:
            target, *sources = operands.split(", ")
            values = [registers[one] if one in registers else int(one, 0) for one in sources]
            registers[target] = OPERATIONS[name](*values)
    return registers["$0"], registers["$1"]


def some_words() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1 << 32, (50,), generator=generator).tolist()


@pytest.mark.parametrize("kind", [kind for kind in INTEGERS if FORMATS[kind].int8_points])
def test_the_assembly_that_looks_points_up(kind: str) -> None:
    """Run by a model of its four instructions: no interpreter of Triton's can."""
    tables = point_tables((kind,), torch.empty(0))
    start = points_start.fn(kind) + 31 * 16
    own = tables.flatten()[start : start + 16].view(torch.uint8)
    words = [int.from_bytes(bytes(part), "little") for part in own.split(4)]
    operands = {f"${3 + at}": word for at, word in enumerate(words)}
    points = [point & 255 for point in FORMATS[kind].int8_points]
    for packed in some_words():
        first, second = run_ptx(LOOK_UP.value, {**operands, "$2": packed})
        for place in range(8):
            found = (first | second << 32) >> (8 * place) & 255
            assert found == points[packed >> (4 * place) & 15]


def test_the_assembly_that_interleaves_bytes() -> None:
    words = some_words()
    for low, high in zip(words, words[1:], strict=False):
        first, second = run_ptx(INTERLEAVE.value, {"$2": low, "$3": high})
        for place in range(4):
            both = (first | second << 32) >> (16 * place)
            assert both & 255 == low >> (8 * place) & 255
            assert both >> 8 & 255 == high >> (8 * place) & 255
