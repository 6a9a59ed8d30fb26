"""What flashinfer's decode kernels need: its memory, and a cache's buffers as its pages."""

from __future__ import annotations

import importlib.util

import torch

PAGE = 16
"""Tokens of a fixed-address cache in each of flashinfer's pages."""
WORKSPACE_BYTES = 128 << 20
"""What flashinfer's documentation asks for."""


def pages(cache: torch.Tensor) -> torch.Tensor:
    """[pages, heads, PAGE, width] over the memory of a buffer [1, heads, capacity, width]."""
    return cache[0].unflatten(1, (-1, PAGE)).transpose(0, 1)


def table(held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """flashinfer's page table of one sequence: (where its pages begin and end, the pages).

    int32 on the CPU, where flashinfer reads them.
    """
    count = held // PAGE + 1
    return torch.tensor([0, count], dtype=torch.int32), torch.arange(count, dtype=torch.int32)


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None
