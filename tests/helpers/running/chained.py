"""Models whose layers are launched ahead."""

from __future__ import annotations

from typing import Any

import tiny
from graphed import cuda_layers_of, greedy


def links_of(model: Any) -> list[Any]:
    return [layer._link for layer in cuda_layers_of(model) if layer._link is not None]


def proven(model: Any) -> bool:
    return all(layer.chain is not None and layer.chain.proven for layer in cuda_layers_of(model))


def answer(model: Any, steps: int = 12) -> list[int]:
    return greedy(model, tiny.tokens(20), steps)


def plain(steps: int = 12) -> list[int]:
    return greedy(tiny.model("mixtral"), tiny.tokens(20), steps)
