"""What codes stand for, in a device's memory: entries of a grid, or points."""

from __future__ import annotations

from functools import cache

import torch

from hybrimoe_plugin.compute.gpu.kernels.formats.description import (
    FORMATS,
    GRIDS,
    POINT_COPIES,
    POINTED,
)
from hybrimoe_plugin.weights.blocks.codebook import grid


def tables(kinds: tuple[str, ...], unused: torch.Tensor) -> torch.Tensor:
    """The grids [bytes] int8 on the device of `unused`, or that if none of the types has one."""
    if any(FORMATS[kind].entries for kind in kinds):
        return _grids(unused.device)
    return unused


def point_tables(kinds: tuple[str, ...], unused: torch.Tensor) -> torch.Tensor:
    """The points [types, 32, 16] int8 of all types with points, 32 copies of them each.

    They lie on the device of `unused`, which is given back if none of `kinds` has points.
    """
    if any(FORMATS[kind].int8_points for kind in kinds):
        return _point_tables(unused.device)
    return unused


@cache
def _point_tables(device: torch.device) -> torch.Tensor:
    """In the order of the descriptions."""
    points = torch.tensor([FORMATS[kind].int8_points for kind in POINTED], dtype=torch.int8)
    return points[:, None].repeat(1, POINT_COPIES, 1).to(device)


@cache
def _grids(device: torch.device) -> torch.Tensor:
    """All of them one after another, in the order of the descriptions."""
    found = []
    for kind in GRIDS:
        # IQ1_M has that of IQ1_S.
        values = grid("IQ1_S" if kind == "IQ1_M" else kind)
        assert values.numel() == FORMATS[kind].entries * FORMATS[kind].entry_values
        found.append(values.flatten().to(torch.int8))
    return torch.cat(found).to(device)
