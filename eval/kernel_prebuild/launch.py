"""Calls of the product's launch code on tensors that claim to lie on a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from eval.kernel_cases.cases import Case, LinearCase
from eval.kernel_cases.runs import product_kernels
from eval.kernel_cases.shapes import Shape
from eval.kernel_prebuild.groups import AnyCase, Int8Case
from eval.models.blocks import stored_bytes
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, Part, SlotLayout, slot_layout
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.layer_path import WholeRepacks

CARD = torch.device("cuda:0")
TOKENS = 2
"""Of the proof of int8 kernels."""


class OnCard(torch.Tensor):
    """Memory of the host that says it is the card's; nobody reads it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        return self


class PretendCard(TorchFunctionMode):
    """Within, tensors are made on the host and say that they lie on the card."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> Any:
        named = {name: _on_host(value) for name, value in (kwargs or {}).items()}
        found = func(*map(_on_host, args), **named)
        return found.as_subclass(OnCard) if type(found) is torch.Tensor else found


def _on_host(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def launch(case: AnyCase) -> None:
    """Call the kernels as `eval.kernel_cases` does, on memory that nobody has filled."""
    with PretendCard():
        if isinstance(case, Case):
            _launch_experts(case)
        elif isinstance(case, LinearCase):
            from hybrimoe_plugin.compute.gpu.kernels.linear import linear

            states = torch.empty(case.tokens, case.columns, dtype=case.dtype)
            matrix = _bytes(stored_bytes(case.kind, case.rows * case.columns))
            linear(states, matrix, case.kind, case.rows)
        elif isinstance(case, Int8Case):
            _launch_int8(case.shape)
        else:
            _launch_repack(case.kind, case.blocks * BLOCK_BYTES[case.kind])


def _launch_experts(case: Case) -> None:
    shape = case.shape
    kernels = product_kernels(case, CARD)
    if isinstance(kernels, TorchKernels):
        return
    layout = kernels.layout(shape.spec)
    call = _call(shape, case.tokens, layout, case.dtype, case.routing)
    planar = tuple(part for part in layout.parts if part.planar)
    for part in planar:
        _launch_repack(part.type_name, part.size)
    if planar and isinstance(kernels, WholeRepacks):
        # All of an expert in one launch, as transfers do.
        kernels.repacker(planar)([_bytes(part.size) for part in planar], call.buffer[0], 0)
    kernels.down(call, kernels.gate_up(call))


def _call(
    shape: Shape,
    tokens: int,
    layout: SlotLayout,
    dtype: torch.dtype,
    routing: torch.dtype | None,
) -> SlotCall:
    """A call in which every slot but one is used."""
    used = shape.experts - 1
    buffer = _bytes((used + 1) * layout.size).view(used + 1, -1)
    slot_ids = (torch.arange(tokens * shape.top_k) % used).view(tokens, -1)
    hidden = torch.empty(tokens, shape.hidden, dtype=dtype)
    weights = torch.empty(tokens, shape.top_k, dtype=routing)
    return SlotCall(buffer, layout, tuple(range(used)), hidden, slot_ids, weights)


def _launch_int8(shape: Shape) -> None:
    """A token in bfloat16, and the proof's two in float32, with which instructions it compares."""
    from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    layout = slot_layout(shape.spec, planar=True)
    blocks = Int8Decode(asm=True).blocks(layout, shape.top_k, Blocks.of(layout, shape.top_k))
    kernels = TritonKernels(CARD, blocks, activations="int8")
    call = _call(shape, 1, layout, torch.bfloat16, torch.bfloat16)
    kernels.down(call, kernels.gate_up(call))
    call = _call(shape, TOKENS, layout, torch.float32, torch.float32)
    plain = TritonKernels(CARD)
    plain.down(call, plain.gate_up(call))
    activations = torch.empty(call.slot_ids.numel(), shape.intermediate)
    for asm in (True, False):
        int8 = Int8Decode(asm)
        int8.gate_up(call, activations, blocks)
        int8.down(call, activations, torch.empty_like(call.hidden), blocks)


def _launch_repack(kind: str, size: int) -> None:
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    part = Part(kind, 1, 1, 0, size, planar=True)
    TritonKernels(CARD).repack(part, _bytes(size), _bytes(size))


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)
