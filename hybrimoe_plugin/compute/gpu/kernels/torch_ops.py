"""The reference kernels: one expert after another in torch operations, on any device.

They compute every type that `dequantize` converts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.activation import activate
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.formats.description import INTEGERS
from hybrimoe_plugin.compute.gpu.kernels.int8.activations import quantise_activations
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout, slot_layout
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.policy.step import FEW_ROWS
from hybrimoe_plugin.weights.dequant import dequantize, supported

_DENSE_TOKENS = 16
"""Up to so many tokens all of them go through an expert, the others with weight 0.

Choosing rows would make the host wait for the device.
"""
_CAPTURED_TOKENS = FEW_ROWS
"""Calls of up to so many tokens can be captured, where that is asked for."""


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
    """Dequantises one slot's matrix at a time to hidden's dtype.

    Args:
        captured: compute calls of few tokens from `slot_ids` alone, pair by pair, so that a
            CUDA graph can hold them and read other slots each time. A token's experts are then
            summed in the order of its `slot_ids`, as the Triton kernels do, and no longer in that
            of `SlotCall.slots`; the products of one token are the same to the last bit.
        int8: round each stage's activations to int8, as the int8 decode kernels do, and compute in
            float32, for a call of any number of tokens. A stage with another type than `INTEGERS`
            stays as it is.
    """

    name = "torch"
    captured = False
    int8 = False

    def __init__(self, captured: bool = False, int8: bool = False) -> None:
        self.captured = captured
        self.int8 = int8

    def refusal(self, spec: ExpertSpec) -> str | None:
        wanted = {spec.gate_type, spec.up_type, spec.down_type}
        unknown = ", ".join(sorted(wanted - set(supported())))
        if not unknown:
            return None
        known = ", ".join(supported())
        return f"no device dequantisation for GGML type {unknown}; there is for {known}"

    def capturable(self) -> TorchKernels:
        return self if self.captured else TorchKernels(captured=True, int8=self.int8)

    def layout(self, spec: ExpertSpec) -> SlotLayout:
        return slot_layout(spec, planar=False)

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        raise AssertionError("these kernels read GGML blocks as they are")

    def gate_up(self, call: SlotCall) -> list[_Activated] | list[torch.Tensor]:
        if self.captured and len(call.hidden) <= _CAPTURED_TOKENS:
            return [self._pair_activations(call, pair) for pair in range(call.slot_ids.numel())]
        return self._gate_up_slots(call)

    def down(self, call: SlotCall, activations: Any) -> torch.Tensor:
        if self.captured and len(call.hidden) <= _CAPTURED_TOKENS:
            return self._pair_sums(call, activations)
        return self._down_slots(call, activations)

    def _gate_up_slots(self, call: SlotCall) -> list[_Activated]:
        found = []
        for slot in call.slots:
            rows, weights = _chosen(call, slot)
            if rows is not None and not len(rows):
                continue
            hidden = call.hidden if rows is None else call.hidden[rows]
            activations = self._activations(call.layout, call.buffer[slot], hidden)
            found.append(_Activated(slot, rows, weights, activations))
        return found

    def _down_slots(self, call: SlotCall, activations: list[_Activated]) -> torch.Tensor:
        output = torch.zeros_like(call.hidden)
        for item in activations:
            part = (
                self._outputs(call.layout, call.buffer[item.slot], item.activations) * item.weights
            )
            if item.rows is None:
                output += part
            else:
                output.index_add_(0, item.rows, part)
        return output

    def _pair_activations(self, call: SlotCall, pair: int) -> torch.Tensor:
        """[1, I]: those of one routed pair; of whatever slot 0 holds where it has no slot."""
        token = pair // call.slot_ids.shape[1]
        hidden = call.hidden[token : token + 1]
        return self._activations(call.layout, _stored(call, pair), hidden)

    def _pair_sums(self, call: SlotCall, activations: list[torch.Tensor]) -> torch.Tensor:
        """[T, H]: the weighted sum over each token's pairs; those without a slot give 0."""
        top_k = call.slot_ids.shape[1]
        absent = (call.slot_ids < 0).view(-1, 1, 1)
        weights = call.topk_weights.to(call.hidden.dtype).reshape(-1, 1, 1)
        output = torch.zeros_like(call.hidden)
        for pair, values in enumerate(activations):
            part = self._outputs(call.layout, _stored(call, pair), values) * weights[pair]
            # What no expert has written may be NaN, which times 0 stays one.
            output[pair // top_k] += part.masked_fill(absent[pair], 0)[0]
        return output

    def _activations(
        self, layout: SlotLayout, stored: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """[N, I] of hidden's dtype: what gate and up of a slot's bytes make of hidden [N, H]."""
        states = self._seen(hidden, layout.gate, layout.up)
        gate_bias, up_bias, _ = _biases(layout, stored, states.dtype)
        gate = F.linear(states, _matrix(layout.gate, stored, states.dtype), gate_bias)
        up = F.linear(states, _matrix(layout.up, stored, states.dtype), up_bias)
        return activate(gate, up, layout.activation).to(hidden.dtype)

    def _outputs(
        self, layout: SlotLayout, stored: torch.Tensor, activations: torch.Tensor
    ) -> torch.Tensor:
        """[N, H] of activations' dtype: what down of a slot's bytes makes of them [N, I]."""
        states = self._seen(activations, layout.down)
        _, _, bias = _biases(layout, stored, states.dtype)
        matrix = _matrix(layout.down, stored, states.dtype)
        return F.linear(states, matrix, bias).to(activations.dtype)

    def _seen(self, states: torch.Tensor, *parts: Part) -> torch.Tensor:
        """What a stage with these matrices sees of its input."""
        if self.int8 and all(part.type_name in INTEGERS for part in parts):
            return quantise_activations(states)
        return states


def _chosen(call: SlotCall, slot: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Token rows that this slot computes (None: all of them) and their routing weights [N, 1]."""
    chosen = call.slot_ids == slot
    shares = call.topk_weights * chosen
    weights = shares.sum(dim=1, keepdim=True).to(call.hidden.dtype)
    if len(call.hidden) <= _DENSE_TOKENS:
        return None, weights
    (rows,) = chosen.any(dim=1).nonzero(as_tuple=True)
    return rows, weights[rows]


def _stored(call: SlotCall, pair: int) -> torch.Tensor:
    """[slot bytes] of a pair's slot, of slot 0 where it has none; the host need not know which."""
    slot = call.slot_ids.view(-1)[pair : pair + 1].clamp(min=0)
    return call.buffer.index_select(0, slot)[0]


def _biases(
    layout: SlotLayout, stored: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[None, None, None]:
    """(gate [I], up [I], down [H]) of a slot's bytes; three times None where there are none."""
    if layout.biases is None:
        return None, None, None
    values = stored[layout.biases.span].view(torch.float32).to(dtype)
    inner = layout.gate.rows
    gate, up, down = values.split((inner, inner, layout.down.rows))
    return gate, up, down


def _matrix(part: Part, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] of a slot's bytes."""
    values = dequantize(stored[part.span], part.type_name, (part.rows, part.columns))
    return values.to(dtype)
