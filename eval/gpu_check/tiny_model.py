"""Tiny models under settings that differ: stages compare their greedy tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.gpu_check.place import Place, Row
from eval.models import tiny
from hybrimoe_plugin import load_model
from hybrimoe_plugin.decode.batch.steady_batches import SteadyBatches
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
    """[N] on the CPU, of all sequences."""
    captured: int
    """Layers that ran as CUDA graphs."""
    layers: int
    step_ms: float = 0.0
    """Median time of the last steps; 0 where it was not taken."""


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


@torch.no_grad()
def together(place: Place, path: Path, batches: Sequence[int], **settings: Any) -> list[Answer]:
    """Greedy tokens of several sequences at once, padded on the left, for each number of them."""
    count = 4 if place.dry else 60
    model = load(place, FUSED, path, "float32", **settings)
    layers = [module for module in model.modules() if isinstance(module, GraphedLayer)]
    answers = []
    try:
        for batch in batches:
            ids = tiny.tokens(PROMPT, batch=batch).to(model.device)
            mask = torch.ones_like(ids)
            mask[1::2, : PROMPT // 2] = 0
            ended = _Ended(model)
            answer = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                stopping_criteria=[ended],
            )
            captured = sum(_captured_sequences(layer) == batch for layer in layers)
            tokens = answer[:, PROMPT:].flatten().cpu()
            answers.append(Answer(tokens, captured, len(layers), ended.step_ms()))
    finally:
        model.hybrimoe.restore()
    return answers


def _captured_sequences(layer: GraphedLayer) -> int:
    others = getattr(layer.layer_call, "others", None)
    return others.captured_sequences if isinstance(others, SteadyBatches) else 0


class _Ended:
    """Notes when each step has ended on the device; never stops."""

    def __init__(self, model: Any) -> None:
        self._accelerator = model.hybrimoe.engines[0].accelerator
        self._at: list[float] = []

    def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        self._accelerator.synchronize()
        self._at.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def step_ms(self) -> float:
        """Median of the second half."""
        half = self._at[len(self._at) // 2 :]
        return 1e3 * statistics.median(later - at for at, later in pairwise(half))


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
