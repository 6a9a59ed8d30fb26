"""Fields of GGML blocks: each function reads one kind of field of blocks [N, bytes] uint8."""

from __future__ import annotations

from functools import cache

import torch


@cache
def constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[len(values)], kept: a CUDA graph that is being captured can copy nothing from the host."""
    return torch.tensor(values, dtype=dtype, device=device)


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """[N, 1] float32 from the float16 at byte `at` of each block."""
    pair = blocks[:, at : at + 2]
    return pair.clone().view(torch.float16).float()


def shifted(packed: torch.Tensor, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """[..., len(shifts)]: `mask` of each value shifted right by each of `shifts`."""
    steps = constant(shifts, packed.dtype, packed.device)
    return (packed[..., None] >> steps) & mask


def strided(packed: torch.Tensor, run: int, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """[N, values]: of each run of bytes first all at the first shift, then all at the next."""
    runs = packed.reshape(len(packed), -1, 1, run)
    steps = constant(shifts, torch.uint8, packed.device)
    return ((runs >> steps[:, None]) & mask).reshape(len(packed), -1)


def words(packed: torch.Tensor, size: int) -> torch.Tensor:
    """[N, n / size] int64 from little-endian unsigned words of `size` bytes [N, n]."""
    parts = packed.reshape(len(packed), -1, size).long()
    places = 8 * torch.arange(size, device=packed.device)
    return (parts << places).sum(dim=-1)


def signs(bits: torch.Tensor) -> torch.Tensor:
    """[N, 8 n] float32: -1 for each set bit of bytes [N, n], lowest first, 1 for the others."""
    set_bits = shifted(bits, (0, 1, 2, 3, 4, 5, 6, 7), 1)
    return 1 - 2 * set_bits.reshape(len(bits), -1).float()
