"""A low-bit copy of a model, made here: round to nearest in groups along the input, 2 to 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrimoe_plugin.errors import ConfigError

ZERO = 8
"""The stored code that torch's 4-bit kernel takes for the group's zero point."""
KERNEL_GROUPS = (32, 64, 128, 256)
KERNEL_ROWS = 16
"""The kernel takes weights with a multiple of so many rows."""


class LowBitLinear(nn.Module):
    """A linear map with weights of 2 to 4 bits, stored in 4.

    Every group has a scale and a zero point. Computes with torch's int4 CPU kernel in bfloat16, or
    dequantises (the plain twin) in any other dtype.

    Args:
        weight: [out, in].
        bias: [out], or None.
        bits: 2, 3 or 4.
        group: input features that share a scale; divides `in`.
        dtype: of inputs and outputs.

    Raises:
        ConfigError: bits or group outside what is supported.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        bits: int,
        group: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        codes, scales, lows = quantize(weight.float(), bits, group)
        self.group = group
        self.shape = tuple(weight.shape)
        self.dtype = dtype
        fits_kernel = group in KERNEL_GROUPS and weight.shape[0] % KERNEL_ROWS == 0
        self.kernel = dtype == torch.bfloat16 and fits_kernel
        """Whether torch's kernel computes it."""
        if self.kernel:
            # Codes centred on the kernel's zero: bfloat16 zero points stay small, and so does their
            # rounding.
            middle = 2 ** (bits - 1)
            centred = codes.int() + (ZERO - middle)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(centred, 1)
            zeros = lows + middle * scales
            pairs = torch.stack([scales.T, zeros.T], dim=-1).to(dtype).contiguous()
        else:
            # Two codes in a byte.
            packed = codes[:, ::2] | (codes[:, 1::2] << 4)
            pairs = torch.stack([scales, lows], dim=-1).to(dtype)
        self.register_buffer("packed", packed)
        self.register_buffer("pairs", pairs)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """[..., out] from [..., in]."""
        if not self.kernel:
            return F.linear(value, self.dequantized(), self.bias)
        outputs, inputs = self.shape
        flat = value.reshape(-1, inputs)
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, self.packed, self.group, self.pairs
        )
        result = result.view(*value.shape[:-1], outputs)
        return result if self.bias is None else result + self.bias

    def dequantized(self) -> torch.Tensor:
        """The weights as the plain twin uses them, [out, in]."""
        packed, pairs = self.packed, self.pairs
        assert isinstance(packed, torch.Tensor) and isinstance(pairs, torch.Tensor)
        assert not self.kernel
        codes = torch.stack([packed & 15, packed >> 4], dim=-1)
        grouped = codes.view(self.shape[0], -1, self.group).to(self.dtype)
        scales = pairs[..., :1]
        lows = pairs[..., 1:]
        return (grouped * scales + lows).view(self.shape)


def quantize(
    weight: torch.Tensor,
    bits: int,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest between each group's extremes.

    With 2 bits, a group from -3 to 6 has the scale 3 and the codes 0, 1, 2, 3 for -3, 0, 3, 6.

    Args:
        weight: float32 [out, in].
        bits: 2, 3 or 4.
        group: input features that share a scale.

    Returns:
        codes uint8 [out, in]; scales float32 [out, in / group]; lowest values float32
        [out, in / group].

    Raises:
        ConfigError: bits or group outside what is supported.
    """
    if bits not in (2, 3, 4):
        raise ConfigError(f"draft bits: expected 2, 3 or 4, found {bits}")
    if group < 2 or weight.shape[1] % group:
        raise ConfigError(f"draft group: expected a divisor of {weight.shape[1]}, found {group}")
    largest = 2**bits - 1
    grouped = weight.view(weight.shape[0], -1, group)
    lows = grouped.amin(-1)
    highs = grouped.amax(-1)
    scales = ((highs - lows) / largest).clamp_min(1e-10)
    steps = (grouped - lows[..., None]) / scales[..., None]
    codes = steps.round().clamp(0, largest).to(torch.uint8)
    return codes.view(weight.shape), scales, lows


def low_bit_copy(
    model: Any,
    bits: Callable[[int], int] | int = 3,
    group: int = 32,
    dtype: torch.dtype | None = None,
    head_bits: int | None = None,
) -> Any:
    """A copy of a causal LM whose decoder linears have few bits.

    Embedding and norms stay as they are.

    Args:
        model: the model to copy; unchanged.
        bits: bits of all layers, or layer -> bits.
        group: input features that share a scale.
        dtype: of the copy; the model's by default.
        head_bits: of the output head, the largest matrix of a small model; None keeps it as it is.

    Raises:
        ConfigError: bits or group outside what is supported.
    """
    dtype = dtype or model.dtype
    layers = model.base_model.layers
    model.base_model.layers = nn.ModuleList()
    try:
        small = copy.deepcopy(model).to(dtype)
    finally:
        model.base_model.layers = layers
    small.base_model.layers = nn.ModuleList(copy.deepcopy(layer).to(dtype) for layer in layers)
    for index, layer in enumerate(small.base_model.layers):
        layer_bits = bits if isinstance(bits, int) else bits(index)
        low_bit_linears(layer, layer_bits, group, dtype)
    if head_bits is not None:
        weight = small.get_output_embeddings().weight.detach()
        small.set_output_embeddings(LowBitLinear(weight, None, head_bits, group, dtype))
    return small.eval()


def low_bit_linears(layer: nn.Module, bits: int, group: int, dtype: torch.dtype) -> None:
    """Replace every linear map in a layer. Mutates."""
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LowBitLinear(child.weight, child.bias, bits, group, dtype))


class LowBitExperts(nn.Module):
    """Routed experts of one layer with few bits, in place of the stacked ones of `transformers`.

    Args:
        experts: for each expert, [2I, H] gate and up weights and [H, I] down weights.
        activation: of the gate.
        bits: 2, 3 or 4.
        group: input features that share a scale.
        dtype: of inputs and outputs.
    """

    def __init__(
        self,
        experts: Iterable[tuple[torch.Tensor, torch.Tensor]],
        activation: Callable[[torch.Tensor], torch.Tensor],
        bits: int,
        group: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.inner = nn.ModuleList()
        """Gate and up projection of each expert."""
        self.outer = nn.ModuleList()
        """Down projection of each expert."""
        for gate_up, down in experts:
            self.inner.append(LowBitLinear(gate_up, None, bits, group, dtype))
            self.outer.append(LowBitLinear(down, None, bits, group, dtype))
        self._activation = activation

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The experts' weighted sum, [T, H].

        Args:
            hidden_states: [T, H].
            top_k_index: expert ids, [T, K].
            top_k_weights: [T, K].
        """
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == expert)
            gate, up = self.inner[expert](hidden_states[tokens]).chunk(2, dim=-1)
            value = self.outer[expert](self._activation(gate) * up)
            weighted = value * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, weighted.to(result.dtype))
        return result
