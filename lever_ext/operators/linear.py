"""Linear maps of few rows with weights that are used once, in the layout of the file."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

FEW_ROWS = 16
"""Where `F.linear` is as fast as the other product on a processor without matrix tiles (AMX)."""


def linear(
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The linear map [..., out] of a value; rows of the result need not be contiguous.

    In bfloat16 on a CPU with AMX, `F.linear` (the plain twin, used for all else) packs the weights
    at every call. As the product's left side they are used in the layout that they have: 1.6 times
    as fast for 1 to 24 rows, 1.2 times for 112. Without AMX that holds for many rows only; for few,
    `F.linear` is up to twice as fast.

    Args:
        value: [..., in].
        weight: [out, in].
        bias: [out].
    """
    rows = value.numel() // value.shape[-1]
    packs_weights = value.dtype == torch.bfloat16 and weight.device.type == "cpu"
    if not packs_weights or (rows < FEW_ROWS and not _has_tiles()):
        return F.linear(value, weight, bias)
    # A transposed value (an earlier result) is slower to read in every tile than to copy once.
    flat = value.reshape(-1, value.shape[-1]).contiguous()
    result = torch.mv(weight, flat[0])[None] if rows == 1 else torch.mm(weight, flat.t()).t()
    result = result.view(*value.shape[:-1], weight.shape[0])
    return result if bias is None else result + bias


@functools.cache
def _has_tiles() -> bool:
    """Whether the processor has matrix tiles (AMX); False where this torch cannot say."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    return bool(torch.cpu.get_capabilities().get("amx_tile", False))


class RowLinear(nn.Linear):
    """`nn.Linear` for few rows at a time."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def with_row_linears(model: Any) -> Any:
    """The model, every `nn.Linear` in it a `RowLinear` of the same parameters. Mutates."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                new = RowLinear(1, 1, bias=False, device="meta")
                new.__dict__.update(child.__dict__)
                setattr(module, name, new)
    return model
