"""Calls of the product's launch code on tensors that claim to lie on a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from eval.kernel_cases.cases import Case, LinearCase
from eval.kernel_cases.runs import product_kernels
from eval.kernel_prebuild.groups import AnyCase
from eval.models.blocks import stored_bytes
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, Part
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.layer_path import WholeRepacks

CARD = torch.device("cuda:0")


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
        else:
            _launch_repack(case.kind, case.blocks * BLOCK_BYTES[case.kind])


def _launch_experts(case: Case) -> None:
    shape = case.shape
    kernels = product_kernels(case, CARD)
    if isinstance(kernels, TorchKernels):
        return
    layout = kernels.layout(shape.spec)
    used = shape.experts - 1
    buffer = _bytes((used + 1) * layout.size).view(used + 1, -1)
    planar = tuple(part for part in layout.parts if part.planar)
    for part in planar:
        _launch_repack(part.type_name, part.size)
    if planar and isinstance(kernels, WholeRepacks):
        # All of an expert in one launch, as transfers do.
        kernels.repacker(planar)([_bytes(part.size) for part in planar], buffer[0], 0)
    places = torch.arange(case.tokens * shape.top_k)
    slot_ids = (places % used).view(case.tokens, -1)
    hidden = torch.empty(case.tokens, shape.hidden, dtype=case.dtype)
    weights = torch.empty(case.tokens, shape.top_k, dtype=case.routing)
    call = SlotCall(buffer, layout, tuple(range(used)), hidden, slot_ids, weights)
    kernels.down(call, kernels.gate_up(call))


def _launch_repack(kind: str, size: int) -> None:
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    part = Part(kind, 1, 1, 0, size, planar=True)
    TritonKernels(CARD).repack(part, _bytes(size), _bytes(size))


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)
