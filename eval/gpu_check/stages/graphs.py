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
from eval.models import tiny
from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.layer_buffers import FIRST_CAPACITY
from hybrimoe_plugin.hosts.transformers.load import load_plain_model

PROMPT = 12
LOGITS_LIMIT = 1e-5
"""Relative RMS error of float32 logits: both sides dequantise exactly, so only the order of sums
differs.
"""
LENGTHS = range(130, 138)
FUSED = "qwen3_moe"
"""The family that runs on Triton's kernels, last. They compile for every shape anew; the others
take torch's twins.
"""


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    for family in sorted(tiny.FAMILIES, key=lambda name: name == FUSED):
        path = place.scratch / f"tiny-{family}.gguf"
        tiny.write_quantised(path, family)
        yield logits(place, family, path)
        yield tokens(place, family, path, "float32")
    if not place.dry:
        yield tokens(place, FUSED, path, "bfloat16")
    yield from attention(place)


def logits(place: Place, family: str, path: Path) -> Row:
    """Logits of a prompt and three decode steps against the plain model on the CPU, in float32."""
    plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
    ours = _load(place, family, path, "float32")
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
    count = 24 if place.dry else FIRST_CAPACITY + 40
    found = []
    captured = 0
    for graphs in ("auto", "off"):
        model = _load(place, family, path, dtype, graphs=graphs)
        try:
            ids = tiny.tokens(PROMPT).to(model.device)
            answer = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
            found.append(answer[0, PROMPT:].cpu())
            layers = [module for module in model.modules() if isinstance(module, GraphedLayer)]
            as_graphs = sum(layer.captured for layer in layers)
            captured = max(captured, as_graphs)
        finally:
            model.hybrimoe.restore()
    graphed, plain = found
    same = int((graphed == plain).sum())
    ok = same == count if dtype == "float32" else None
    return {
        "case": f"{family}: greedy tokens with graphs and without, {dtype}",
        "ok": ok,
        "tokens": count,
        "same": same,
        "layers_captured": captured,
        "layers": len(layers),
    }


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


def _load(place: Place, family: str, path: Path, dtype: str, **settings: Any) -> Any:
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
    model, _ = load_model(None, path, progress=False, **known, **settings)
    return model


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
