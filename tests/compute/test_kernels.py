"""Device kernels against float64: small shapes in the interpreter, the models' own on a GPU; and
compiled for one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from kernel_cases import random_layer

from eval.kernel_cases.cases import (
    LARGE,
    LIMITS,
    TOKENS,
    Case,
    LinearCase,
    RepackCase,
    candidate_cases,
    cases,
    linear_cases,
    odd_cases,
    repack_cases,
)
from eval.kernel_cases.data import random_matrices
from eval.kernel_cases.reference import poisoned, reference
from eval.kernel_cases.runs import product_kernels, run_case, run_linear, run_repack
from eval.kernel_cases.shapes import MODEL_SHAPES, ODD_SHAPES, SMALL_SHAPES, TYPES, Shape
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS, INTEGERS, SUPPORTED
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, PLANES, slot_layout, to_planes
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.weights.dequant import dequantize, supported
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes

pytest.importorskip("triton")
from hybrimoe_plugin.compute.gpu.kernels.linear import linear
from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
CPU = torch.device("cpu")

# On a GPU `cases` holds the odd ones too.
EXPERTS = [*cases(INTERPRETED), *(odd_cases(INTERPRETED) if INTERPRETED else [])]


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.name)
def test_experts_equal_the_reference(case: Case) -> None:
    assert run_case(case, product_kernels(case, DEVICE), DEVICE) < case.limit


@pytest.mark.parametrize("case", linear_cases(INTERPRETED), ids=lambda case: case.name)
def test_linears_equal_the_reference(case: LinearCase) -> None:
    assert run_linear(case, DEVICE) < case.limit


@pytest.mark.parametrize("case", repack_cases(INTERPRETED), ids=lambda case: case.name)
def test_repacking_puts_every_byte_in_its_plane_and_none_beside(case: RepackCase) -> None:
    assert run_repack(case, DEVICE) == 0


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("case", candidate_cases(), ids=lambda case: case.name)
def test_every_tile_that_tuning_may_choose_equals_the_reference(case: Case) -> None:
    assert run_case(case, product_kernels(case, DEVICE), DEVICE) < case.limit


def test_plain_twin_runs_the_same_calls() -> None:
    for kinds in (
        ("Q4_K", "Q4_K", "Q6_K"),
        ("F32", "BF16", "Q8_0"),
        ("IQ4_NL", "Q2_K", "IQ4_XS"),
        ("IQ2_XXS", "IQ3_S", "Q3_K"),
    ):
        for tokens in (1, 16, 17):
            case = Case(Shape("small", kinds, 256, 256, 4, 2), tokens, torch.float32)
            assert run_case(case, TorchKernels(), DEVICE) < case.limit


def test_a_gpu_runs_the_tiles_dtypes_and_shapes_of_the_product() -> None:
    found = cases(interpreted=False)
    tiled = [case for case in found if case.blocks is not None]
    assert not tiled, "other tiles than the product's say nothing about it"
    for shape in MODEL_SHAPES:
        mine = [case for case in found if case.shape == shape]
        assert {case.tokens for case in mine if case.dtype == torch.bfloat16} >= set(TOKENS)
        assert {case.dtype for case in mine} == set(LIMITS)
    sizes = {
        Blocks.of(slot_layout(case.shape.spec, planar=True), case.shape.top_k).tile_tokens(
            case.tokens * case.shape.top_k, case.shape.experts - 1
        )
        for case in found
        if case.tokens > 8 and case.dtype == torch.bfloat16
    }
    assert sizes == {16, 32, 64}, "every size of prefill tile"
    assert {kind for case in found for kind in case.shape.kinds} >= set(TYPES)
    assert {case.kind for case in linear_cases()} == set(TYPES)
    assert {*TYPES, "MXFP4"} == set(SUPPORTED), "which an older gguf package does not name"
    assert {case.limit for case in found if case.dtype == torch.float32 and case.tokens == 1} == {
        1e-6
    }


def test_candidates_are_what_tuning_tries() -> None:
    tried: list[Blocks] = []

    class Noted(TritonKernels):
        def _gate_up_decode(self, call, blocks):  # type: ignore[no-untyped-def]
            tried.append(blocks)
            return torch.empty(0)

    shape = SMALL_SHAPES[0]
    kernels = Noted(CPU)
    layout = kernels.layout(shape.spec)
    slots = torch.zeros(shape.top_k, layout.size, dtype=torch.uint8)
    kernels.tune(layout, shape.top_k, slots, lambda _work: 1.0)
    assert {case.blocks for case in candidate_cases([shape])} == set(tried)


@pytest.mark.parametrize(
    "kernels", [TritonKernels(CPU, LARGE, decode_tokens=8), TorchKernels()], ids=["triton", "torch"]
)
@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
@pytest.mark.parametrize("tokens", [1, 12])
def test_a_kernel_that_leaves_outputs_out_is_found(
    kernels: TritonKernels | TorchKernels, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the last column: it holds what the allocator gave."""
    case = Case(SMALL_SHAPES[3], tokens, torch.float32)
    down = kernels.down

    def short(call, activations):  # type: ignore[no-untyped-def]
        whole = down(call, activations)
        found = torch.empty_like(whole)
        found[:, :-1] = whole[:, :-1]
        return found

    monkeypatch.setattr(kernels, "down", short)
    assert not run_case(case, kernels, CPU) < case.limit


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_decode_kernels_take_more_than_8_rows(activations: str) -> None:
    case = Case(SMALL_SHAPES[0], 12, torch.float32)
    kernels = TritonKernels(CPU, LARGE, activations=activations)
    limit = case.limit if activations == "float" else 0.02
    assert run_case(case, kernels, CPU) < limit


def test_memory_that_nobody_wrote_reads_as_nan() -> None:
    with poisoned():
        for dtype in LIMITS:
            empty = torch.empty(7, 9, dtype=dtype, device=DEVICE)
            assert empty.isnan().all()
            assert torch.empty_like(empty, memory_format=torch.contiguous_format).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_reference_is_ggufs_own() -> None:
    """The reference that runs on a device, against gguf's dequantisation and one token and expert
    after another.
    """
    for shape in ODD_SHAPES:
        matrices = random_matrices(shape, 0, CPU)
        hidden = torch.randn(3, shape.hidden, generator=torch.Generator().manual_seed(1))
        ids = torch.stack([torch.randperm(shape.experts)[: shape.top_k] for _ in range(3)])
        routing = torch.rand(3, shape.top_k)
        inner = (shape.intermediate, shape.hidden)
        outer = (shape.hidden, shape.intermediate)
        wanted = torch.zeros(3, shape.hidden, dtype=torch.float64)
        for token in range(3):
            for expert, weight in zip(ids[token].tolist(), routing[token].tolist(), strict=True):
                if expert == 0:
                    continue
                gate, up, down = (
                    dequantize_bytes(matrix[expert].numpy(), kind, size).double()
                    for matrix, kind, size in zip(
                        matrices, shape.kinds, (inner, inner, outer), strict=True
                    )
                )
                state = hidden[token].double()
                wanted[token] += weight * (
                    down @ (torch.nn.functional.silu(gate @ state) * (up @ state))
                )
        torch.testing.assert_close(reference(shape, matrices, hidden, ids, routing), wanted)


@pytest.mark.parametrize("kind", PLANES)
def test_planes_hold_every_byte_once(kind: str) -> None:
    size = BLOCK_BYTES[kind]
    assert sorted(b for at, count in PLANES[kind] for b in range(at, at + count)) == list(
        range(size)
    )


@pytest.mark.parametrize("kind", TYPES)
def test_descriptions_agree_with_gguf(kind: str) -> None:
    described = FORMATS[kind]
    assert (described.values, described.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    sizes = [size for _, size in described.planes]
    assert all(size.bit_count() == 1 for size in sizes), "the repacking kernel's demand"
    assert sizes == sorted(sizes, reverse=True), "no plane is less aligned than the one before it"
    if described.points:
        assert described.points == tuple(quants.IQ4_NL.kvalues)


@pytest.mark.skipif("MXFP4" not in TYPES, reason="an older gguf package")
@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times 0
@pytest.mark.parametrize("tokens", [8, 16])
def test_every_code_and_exponent_of_mxfp4(tokens: int) -> None:
    """To the last bit; scales above 2^113 give no finite number."""
    rows, columns = 256, 32
    blocks = torch.zeros(rows, 17, dtype=torch.uint8)
    blocks[:, 0] = torch.arange(rows)
    blocks[:, 1:] = 16 * torch.arange(16) + torch.arange(16).flip(0)
    stored = blocks.flatten()
    planes = torch.from_numpy(to_planes(stored.numpy(), "MXFP4")).to(DEVICE)
    wanted = dequantize(stored, "MXFP4", (rows, columns)).T
    for first in range(0, columns, tokens):
        states = torch.eye(columns, device=DEVICE)[first : first + tokens]
        found = linear(states, planes, "MXFP4", rows).cpu()
        part = wanted[first : first + tokens]
        assert torch.equal(found[:, :241], part[:, :241])
        assert not found[:, 241:][part[:, 241:] != 0].isfinite().any()


def test_the_page_on_formats_names_every_type() -> None:
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    rows = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines()]
    (fused,) = [row[1] for row in rows if len(row) == 4 and "fused Triton kernels" in row[2]]
    (others,) = [row[1] for row in rows if len(row) == 4 and row[2].strip() == "none"]
    assert set(fused.strip().split(", ")) == set(SUPPORTED)
    assert set(others.strip().split(", ")) == set(supported()) - set(SUPPORTED)


def test_what_the_kernels_refuse() -> None:
    kernels = TritonKernels(DEVICE)
    spec = random_layer(("Q8_0",) * 3, 256, 320).spec
    assert kernels.refusal(spec) is None
    assert "TQ1_0" in str(kernels.refusal(replace(spec, up_type="TQ1_0")))
    assert "320 columns" in str(kernels.refusal(replace(spec, down_type="Q6_K")))


def test_slots_start_aligned_whatever_the_types() -> None:
    for shape in (*ODD_SHAPES, *MODEL_SHAPES):
        spec: ExpertSpec = shape.spec
        layout = slot_layout(spec, planar=True)
        assert all(part.offset % 256 == 0 for part in layout.parts)
        assert layout.size % 256 == 0
        assert spec.expert_bytes <= layout.size < spec.expert_bytes + 3 * 256


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    """Triton compiles without a device: every type in every kernel must give sm_90 code, in wide
    loads.
    """
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    float_kernels = 6 * len(SUPPORTED) + len(PLANES)
    # Two stages, and what brings activations to int8.
    assert run.stdout.count("ok") == float_kernels + 3 * len(INTEGERS)
