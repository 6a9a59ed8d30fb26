"""A toy model with a pack of some kilobytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lever_ext.flash.source import StateDictSource
from lever_ext.flash.writer import write_pack

LAYERS = 6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 96)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(64)


def make(
    directory: Path, seed: int = 0, dtype: str = "float32"
) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model = Toy()
    state = dict(model.state_dict())
    return write_pack(
        StateDictSource(state, f"toy {seed}"), model, {"seed": seed}, directory, dtype
    ), state
