"""The grids of the types whose codes stand for entries of one, in a device's memory."""

from __future__ import annotations

from functools import cache

import torch

from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS, GRIDS
from hybrimoe_plugin.weights.blocks.codebook import grid


def tables(kinds: tuple[str, ...], unused: torch.Tensor) -> torch.Tensor:
    """The grids [bytes] int8 on the device of `unused`, or that if none of the types has one."""
    if any(FORMATS[kind].entries for kind in kinds):
        return _grids(unused.device)
    return unused


def point_words(kind: str, unused: torch.Tensor) -> torch.Tensor:
    """A type's points [32, 16] int8, a copy for each thread of a warp, or `unused` without any."""
    if FORMATS[kind].int8_points:
        return _points(FORMATS[kind].int8_points, unused.device)
    return unused


@cache
def _points(points: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.int8).repeat(32, 1).to(device)


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
