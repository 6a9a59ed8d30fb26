"""Tiny models under settings that differ: stages compare their greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.gpu_check.place import Place, Row
from eval.models import tiny
from hybrimoe_plugin import load_model
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.layer_buffers import FIRST_CAPACITY

PROMPT = 12
FUSED = "qwen3_moe"
"""The family that runs on Triton's kernels. They compile for every shape anew; the others take
torch's twins.
"""


class Answer(NamedTuple):
    """What a model said."""

    tokens: torch.Tensor
    """[N] on the CPU."""
    captured: int
    """Layers that ran as CUDA graphs."""
    layers: int


def load(place: Place, family: str, path: Path, dtype: str, **settings: Any) -> Any:
    """A tiny model, half of its experts cached unless `settings` say otherwise."""
    # Any profile will do: results must not depend on what is computed where.
    known: dict[str, Any] = {
        "accelerator": place.accelerator,
        "dtype": dtype,
        "profile": "a6000-deepseek-v2-lite",
        "cache_ratio": 0.5,
        "context": 2 * FIRST_CAPACITY,
        "cpu_backend": "torch",  # the one that does not round activations to 8 bits
    }
    if place.dry or family != FUSED:
        known["kernels"] = "torch"
        known["dense"] = "dequantised"  # on the CPU stored linears round activations too
    model, _ = load_model(None, path, progress=False, **{**known, **settings})
    return model


def greedy(place: Place, family: str, path: Path, dtype: str, **settings: Any) -> Answer:
    """Greedy tokens, on a card past the room that the graphs' cache is first given."""
    count = 24 if place.dry else FIRST_CAPACITY + 40
    model = load(place, family, path, dtype, **settings)
    try:
        ids = tiny.tokens(PROMPT).to(model.device)
        answer = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
        layers = [module for module in model.modules() if isinstance(module, GraphedLayer)]
        captured = sum(layer.captured for layer in layers)
        return Answer(answer[0, PROMPT:].cpu(), captured, len(layers))
    finally:
        model.hybrimoe.restore()


def compared(case: str, one: Answer, other: Answer, judged: bool) -> Row:
    """A row on two answers that must be the same.

    Args:
        judged: False where rounding differs and one swapped token changes all behind it.
    """
    count = len(one.tokens)
    same = int((one.tokens == other.tokens).sum())
    return {
        "case": case,
        "ok": same == count if judged else None,
        "tokens": count,
        "same": same,
        "layers_captured": max(one.captured, other.captured),
        "layers": one.layers,
    }
