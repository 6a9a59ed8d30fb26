"""The plain twin: one expert after another in torch operations, on any device, for every type
`dequantize` knows.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout, slot_layout
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.weights.dequant import dequantize, supported

_DENSE_TOKENS = 16
"""Up to here every token goes through an expert and the others' weight is 0: choosing rows would
stop the device.
"""

Chosen = tuple[int, "torch.Tensor | None", torch.Tensor, torch.Tensor]
"""(slot, token rows or None for all, their routing weights [N, 1], activations [N, I])."""


class TorchKernels:
    """Dequantises one slot's matrix at a time to hidden's dtype."""

    name = "torch"

    def refusal(self, spec: ExpertSpec) -> str | None:
        unknown = sorted({spec.gate_type, spec.up_type, spec.down_type} - set(supported()))
        if unknown:
            return (
                f"no device dequantisation for GGML type {', '.join(unknown)}; there is for "
                f"{', '.join(supported())}"
            )
        return None

    def layout(self, spec: ExpertSpec) -> SlotLayout:
        return slot_layout(spec, split=False)

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        raise AssertionError("the plain twin reads GGML blocks as they are")

    def gate_up(self, call: SlotCall) -> list[Chosen]:
        found = []
        for slot in call.slots:
            rows, weights = _chosen(call, slot)
            if rows is None or len(rows):
                hidden = call.hidden if rows is None else call.hidden[rows]
                gate = F.linear(hidden, _matrix(call, call.layout.gate, slot))
                up = F.linear(hidden, _matrix(call, call.layout.up, slot))
                found.append((slot, rows, weights, F.silu(gate) * up))
        return found

    def down(self, call: SlotCall, activations: list[Chosen]) -> torch.Tensor:
        output = torch.zeros_like(call.hidden)
        for slot, rows, weights, activation in activations:
            part = F.linear(activation, _matrix(call, call.layout.down, slot)) * weights
            if rows is None:
                output += part
            else:
                output.index_add_(0, rows, part)
        return output


def _chosen(call: SlotCall, slot: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Token rows that this slot computes (None: all of them) and their routing weights [N, 1]."""
    chosen = call.slot_ids == slot
    weights = (call.topk_weights * chosen).sum(dim=1, keepdim=True).to(call.hidden.dtype)
    if len(call.hidden) <= _DENSE_TOKENS:
        return None, weights
    rows = chosen.any(dim=1).nonzero(as_tuple=True)[0]
    return rows, weights[rows]


def _matrix(call: SlotCall, part: Part, slot: int) -> torch.Tensor:
    raw = call.buffer[slot, part.offset : part.offset + part.size]
    return dequantize(raw, part.type_name, (part.rows, part.columns)).to(call.hidden.dtype)
