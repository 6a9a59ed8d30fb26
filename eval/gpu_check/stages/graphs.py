"""Tiny models of every family: the plain model's logits, tokens with and without CUDA graphs.

Also which attention backend is quick when every token brings a new length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eval.gpu_bench.bandwidth import attention_us
from eval.gpu_check.place import Place, Row
from eval.gpu_check.tiny_model import FUSED, PROMPT, compared, greedy, load, together
from eval.models import tiny
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.hosts.transformers.load import load_plain_model

LOGITS_LIMIT = 1e-5
"""Relative RMS error of float32 logits: both sides dequantise exactly, so only the order of sums
differs.
"""
LENGTHS = range(130, 138)
BATCHES = 4, 16


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    # The family whose kernels are compiled comes last.
    for family in sorted(tiny.FAMILIES, key=lambda name: name == FUSED):
        path = place.scratch / f"tiny-{family}.gguf"
        tiny.write_quantised(path, family)
        yield logits(place, family, path)
        yield tokens(place, family, path, "float32")
    if not place.dry:
        yield tokens(place, FUSED, path, "bfloat16")
    yield from batches(place, path)
    yield from attention(place)


def logits(place: Place, family: str, path: Path) -> Row:
    """Logits of a prompt and three decode steps against the plain model on the CPU, in float32."""
    plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
    ours = load(place, family, path, "float32")
    try:
        ids = tiny.tokens(PROMPT + 3)
        right = _step_logits(plain, ids)
        found = _step_logits(ours, ids)
    finally:
        ours.hybrimoe.restore()
    error = float((found - right).norm() / right.norm())
    return {
        "case": f"{family}: logits against the plain model",
        "ok": error < LOGITS_LIMIT,
        "error": error,
    }


def tokens(place: Place, family: str, path: Path, dtype: str) -> Row:
    """Greedy tokens with graphs and without, past the room that the graphs' cache is first given.

    Judged in float32, where no two logits of these models are close enough for rounding to swap
    them. In bfloat16 one swap changes all tokens behind it, so there the count is only shown.
    """
    case = f"{family}: greedy tokens with graphs and without, {dtype}"
    graphed = greedy(place, family, path, dtype, graphs="auto")
    plain = greedy(place, family, path, dtype, graphs="off")
    return compared(case, graphed, plain, judged=dtype == "float32")


def batches(place: Place, path: Path) -> Iterator[Row]:
    """Greedy tokens of several sequences with graphs and without, and the time of a step."""
    sizes = BATCHES[:1] if place.dry else BATCHES
    graphed = together(place, path, sizes, graphs="auto")
    plain = together(place, path, sizes, graphs="off")
    for batch, one, other in zip(sizes, graphed, plain, strict=True):
        case = f"{FUSED}: {batch} sequences with graphs and without, float32"
        row = compared(case, one, other, judged=True)
        yield {**row, "step_ms": one.step_ms, "step_ms_without_graphs": other.step_ms}


def attention(place: Place) -> Iterator[Row]:
    """Times of attention at key lengths that are new to the process.

    Eager decode meets one at every token; a backend that plans for each is too slow there.
    """
    if place.dry:
        yield {"case": "attention at new lengths", "ok": None, "missing": "a card"}
        return
    for cudnn in (False, True):
        state = "on" if cudnn else "off, as the product has it"
        us = attention_us(place.device, LENGTHS, cudnn)
        yield {"case": f"attention at new lengths, cuDNN {state}", "us_per_layer": us}


@torch.no_grad()
def _step_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] on the CPU: of a prompt, then of tokens one by one."""
    ids = ids.to(model.device)
    keyword = cache_name(model)
    out = model(ids[:, :PROMPT], use_cache=True)
    parts = [out.logits[0]]
    for at in range(PROMPT, ids.shape[1]):
        kept = {keyword: cache_in(out)}
        out = model(ids[:, at : at + 1], **kept, use_cache=True)
        parts.append(out.logits[0])
    return torch.cat(parts).float().cpu()
