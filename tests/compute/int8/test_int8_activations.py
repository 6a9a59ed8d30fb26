"""Activations in int8, and the torch kernels that see them so."""

from __future__ import annotations

import pytest
import torch

from eval.kernel_cases.cases import Case
from eval.kernel_cases.data import fill, random_call, random_matrices
from eval.kernel_cases.reference import reference, rms_error
from eval.kernel_cases.runs import run_case
from eval.kernel_cases.shapes import Shape
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.int8.activations import int8_codes, quantise_activations
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels

CPU = torch.device("cpu")


def test_a_group_of_32_has_its_own_scale_and_its_largest_value_stays() -> None:
    values = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    values[:, 32:64] *= 1000
    codes, scales = int8_codes(values)
    groups = values.view(3, 3, 32)
    assert torch.equal(scales, groups.abs().amax(-1) / 127)
    assert torch.equal(codes.view(3, 3, 32).abs().amax(-1), torch.full((3, 3), 127))
    seen = quantise_activations(values).view(3, 3, 32)
    assert ((seen - groups).abs() <= scales[..., None] * 0.5001).all()
    assert torch.equal(quantise_activations(seen.flatten(1)), seen.flatten(1))


def test_ties_go_to_the_even_code() -> None:
    values = torch.zeros(32)
    values[:5] = torch.tensor([127.0, 0.5, 1.5, -2.5, 3.4])
    assert int8_codes(values)[0][:5].tolist() == [127, 0, 2, -2, 3]


def test_odd_groups() -> None:
    values = torch.zeros(4, 32)
    values[1, 3] = float("inf")
    values[2, 3] = float("nan")
    values[3, :2] = torch.tensor([190.0, -190.0]) * 2.0**-149
    codes, _ = int8_codes(values)
    assert codes[3].abs().max() <= 127
    seen = quantise_activations(values)
    assert torch.equal(seen[0], torch.zeros(32))
    assert seen[1].isnan().all()
    assert seen[2].isnan().all()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_kernels_see_both_stages_in_int8(captured: bool, dtype: torch.dtype) -> None:
    """Against float64 products of what the stages see."""
    shape = Shape("small", ("Q4_K", "Q5_K", "Q6_K"), 256, 256, 4, 2)
    matrices = random_matrices(shape, 1, CPU)
    kernels = TorchKernels(captured=captured, int8=True)
    buffer, slot_of = fill(kernels, shape, matrices, CPU)
    hidden, ids, routing = random_call(shape, 2, dtype, 1, CPU)
    used = tuple(slot for slot in slot_of.tolist() if slot >= 0)
    call = SlotCall(buffer, kernels.layout(shape.spec), used, hidden, slot_of[ids], routing)
    found = kernels.down(call, kernels.gate_up(call))
    wanted = reference(shape, matrices, hidden, ids, routing)
    error = rms_error(found, wanted)
    assert 1e-3 < error < 2e-2
    # Of the error nearly all comes from rounding both stages' inputs; without it none is left.
    exact = TorchKernels(captured=captured)
    small = rms_error(exact.down(call, exact.gate_up(call)), wanted)
    assert small < (1e-6 if dtype == torch.float32 else error)


def test_types_whose_codes_are_no_integers_stay_as_they_are() -> None:
    case = Case(Shape("odd", ("BF16", "F16", "IQ3_S"), 256, 256, 3, 2), 2, torch.float32)
    assert run_case(case, TorchKernels(int8=True), CPU) < case.limit
