"""The reference kernels: one expert after another in torch operations, on any device.

They compute every type that `dequantize` converts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.activation import activate
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout, slot_layout
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.weights.dequant import dequantize, supported

_DENSE_TOKENS = 16
"""Up to so many tokens all of them go through an expert, the others with weight 0.

Choosing rows would make the host wait for the device.
"""


class _Activated(NamedTuple):
    """What gate and up make of the tokens of one slot."""

    slot: int
    rows: torch.Tensor | None
    """[N] tokens; None for all."""
    weights: torch.Tensor
    """[N, 1] their routing weights."""
    activations: torch.Tensor
    """[N, I]"""


class TorchKernels:
    """Dequantises one slot's matrix at a time to hidden's dtype."""

    name = "torch"

    def refusal(self, spec: ExpertSpec) -> str | None:
        wanted = {spec.gate_type, spec.up_type, spec.down_type}
        unknown = ", ".join(sorted(wanted - set(supported())))
        if not unknown:
            return None
        known = ", ".join(supported())
        return f"no device dequantisation for GGML type {unknown}; there is for {known}"

    def layout(self, spec: ExpertSpec) -> SlotLayout:
        return slot_layout(spec, planar=False)

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        raise AssertionError("these kernels read GGML blocks as they are")

    def gate_up(self, call: SlotCall) -> list[_Activated]:
        found = []
        for slot in call.slots:
            rows, weights = _chosen(call, slot)
            if rows is not None and not len(rows):
                continue
            hidden = call.hidden if rows is None else call.hidden[rows]
            gate_bias, up_bias, _ = _biases(call, slot)
            gate = F.linear(hidden, _matrix(call, call.layout.gate, slot), gate_bias)
            up = F.linear(hidden, _matrix(call, call.layout.up, slot), up_bias)
            activations = activate(gate, up, call.layout.activation)
            found.append(_Activated(slot, rows, weights, activations))
        return found

    def down(self, call: SlotCall, activations: list[_Activated]) -> torch.Tensor:
        output = torch.zeros_like(call.hidden)
        for item in activations:
            matrix = _matrix(call, call.layout.down, item.slot)
            _, _, bias = _biases(call, item.slot)
            part = F.linear(item.activations, matrix, bias) * item.weights
            if item.rows is None:
                output += part
            else:
                output.index_add_(0, item.rows, part)
        return output


def _chosen(call: SlotCall, slot: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Token rows that this slot computes (None: all of them) and their routing weights [N, 1]."""
    chosen = call.slot_ids == slot
    shares = call.topk_weights * chosen
    weights = shares.sum(dim=1, keepdim=True).to(call.hidden.dtype)
    if len(call.hidden) <= _DENSE_TOKENS:
        return None, weights
    (rows,) = chosen.any(dim=1).nonzero(as_tuple=True)
    return rows, weights[rows]


def _biases(
    call: SlotCall, slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[None, None, None]:
    """(gate [I], up [I], down [H]) of hidden's dtype; three times None where there are none."""
    layout = call.layout
    if layout.biases is None:
        return None, None, None
    values = call.buffer[slot, layout.biases.span].view(torch.float32).to(call.hidden.dtype)
    inner = layout.gate.rows
    gate, up, down = values.split((inner, inner, layout.down.rows))
    return gate, up, down


def _matrix(call: SlotCall, part: Part, slot: int) -> torch.Tensor:
    """[rows, columns] of hidden's dtype."""
    raw = call.buffer[slot, part.span]
    values = dequantize(raw, part.type_name, (part.rows, part.columns))
    return values.to(call.hidden.dtype)
