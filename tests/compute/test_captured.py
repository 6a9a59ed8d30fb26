"""Calls that a CUDA graph can hold: they read their slots on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eval.kernel_cases.cases import Case
from eval.kernel_cases.data import fill, random_call, random_matrices
from eval.kernel_cases.reference import poisoned
from eval.kernel_cases.runs import run_case
from eval.kernel_cases.shapes import Shape
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels

CPU = torch.device("cpu")
KINDS = (("Q4_K", "Q5_K", "Q6_K"), ("IQ4_NL", "Q2_K", "IQ2_XXS"), ("IQ1_S", "Q8_0", "IQ3_S"))
FROM_HOST = ("_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy", "index.Tensor_mask")
"""Operations that make the host wait for a device, or copy from it."""


class Noted(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def call_of(kinds: tuple[str, str, str], tokens: int, dtype: torch.dtype) -> SlotCall:
    """Random experts in slots, of which expert 0 has none."""
    shape = Shape("small", kinds, 256, 256, 5, 3)
    kernels = TorchKernels()
    buffer, slot_of = fill(kernels, shape, random_matrices(shape, 3, CPU), CPU)
    hidden, ids, routing = random_call(shape, tokens, dtype, tokens, CPU)
    used = tuple(sorted(slot for slot in slot_of.tolist() if slot >= 0))
    return SlotCall(buffer, kernels.layout(shape.spec), used, hidden, slot_of[ids], routing)


def computed(call: SlotCall, captured: bool) -> torch.Tensor:
    kernels = TorchKernels(captured=captured)
    with poisoned():
        return kernels.down(call, kernels.gate_up(call))


@pytest.mark.parametrize("tokens", [1, 3, 8, 32])
@pytest.mark.parametrize("kinds", KINDS)
def test_they_equal_the_reference(kinds: tuple[str, str, str], tokens: int) -> None:
    case = Case(Shape("small", kinds, 256, 256, 5, 3), tokens, torch.float32)
    assert run_case(case, TorchKernels(captured=True), CPU) < case.limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", KINDS)
def test_one_token_has_the_same_bits_where_slots_come_in_its_order(
    kinds: tuple[str, str, str], dtype: torch.dtype
) -> None:
    call = call_of(kinds, 1, dtype)
    in_order = tuple(slot for slot in call.slot_ids[0].tolist() if slot >= 0)
    assert len(in_order) > 1
    call = call._replace(slots=in_order)
    assert torch.equal(computed(call, captured=True), computed(call, captured=False))


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_captured_sees_the_same_activations(int8: bool) -> None:
    plain = TorchKernels(int8=int8)
    captured = plain.capturable()
    call = call_of(KINDS[0], 1, torch.float32)
    call = call._replace(slots=tuple(slot for slot in call.slot_ids[0].tolist() if slot >= 0))
    found = captured.down(call, captured.gate_up(call))
    assert torch.equal(found, plain.down(call, plain.gate_up(call)))


def test_a_token_does_not_depend_on_the_others() -> None:
    call = call_of(KINDS[0], 8, torch.bfloat16)
    whole = computed(call, captured=True)
    for token in range(8):
        rows = slice(token, token + 1)
        alone = call._replace(
            hidden=call.hidden[rows],
            slot_ids=call.slot_ids[rows],
            topk_weights=call.topk_weights[rows],
        )
        assert torch.equal(computed(alone, captured=True), whole[rows])


def test_the_host_need_not_know_the_slots() -> None:
    call = call_of(KINDS[0], 4, torch.float32)
    wanted = computed(call, captured=True)
    assert torch.equal(computed(call._replace(slots=()), captured=True), wanted)


def test_a_token_without_slots_gives_zeros_whatever_slot_0_holds() -> None:
    call = call_of(KINDS[0], 2, torch.float32)
    call.buffer[0] = 0xFF
    call.slot_ids[1] = -1
    found = computed(call, captured=True)
    assert found.isfinite().all()
    assert found[0].abs().max() > 0
    assert torch.equal(found[1], torch.zeros_like(found[1]))


@pytest.mark.parametrize("kinds", KINDS)
def test_nothing_goes_between_host_and_device(kinds: tuple[str, str, str]) -> None:
    call = call_of(kinds, 2, torch.float32)
    kernels = TorchKernels(captured=True)
    kernels.down(call, kernels.gate_up(call))  # constants reach the device once
    with Noted() as noted:
        kernels.down(call, kernels.gate_up(call))
    assert noted.names
    for name in noted.names - {"_to_copy.default"}:  # dtypes are changed by it too
        assert not name.startswith(FROM_HOST), name


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_triton_decode_needs_no_slots_on_the_host(activations: str) -> None:
    pytest.importorskip("triton")
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    shape = Shape("small", ("Q8_0", "Q8_0", "Q4_0"), 64, 64, 3, 2)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kernels = TritonKernels(device, activations=activations)
    buffer, slot_of = fill(kernels, shape, random_matrices(shape, 3, device), device)
    hidden, ids, routing = random_call(shape, 2, torch.float32, 2, device)
    layout = kernels.layout(shape.spec)
    call = SlotCall(buffer, layout, (0, 1, 2), hidden, slot_of[ids], routing)
    wanted = kernels.down(call, kernels.gate_up(call))
    call = call._replace(slots=())
    assert torch.equal(kernels.down(call, kernels.gate_up(call)), wanted)
