"""Questions for threads that share a model, and models of every kind to put them to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from replayed import Replayed
from transformers.generation.streamers import BaseStreamer

from hybrimoe_plugin import load_model
from hybrimoe_plugin.decode import connect, layer_buffers

THREADS = 8
ANSWERS = int(os.environ.get("HYBRIMOE_LONG", 1))
"""Of each thread."""
GAP = 0.03
"""Least distance between the likeliest token and the next: where an expert computes changes the
rounding, and with it which of two that are all but tied is chosen.
"""

EMULATED = {"accelerator": "emulated", "cache_ratio": 0.4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("mixtral", {"cpu_backend": "torch"}),
    "ggml": ("qwen3_moe", {"cpu_backend": "ggml"}),
    "operations": ("qwen3_moe", {"accelerator": "none"}),
    "ggml, latent attention": ("deepseek_v3", {"cpu_backend": "ggml"}),
    "ggml, module by module": (
        "qwen2_moe",
        {"cpu_backend": "ggml", "cpu_graphs": "off", "dtype": "bfloat16"},
    ),
    "kt": ("qwen3_moe", {"cpu_backend": "kt"}),
    "emulated, ggml": ("mixtral", {**EMULATED, "cpu_backend": "ggml"}),
    "emulated, kt": ("qwen3_moe", {**EMULATED, "cpu_backend": "kt"}),
    "emulated, torch": ("qwen3_moe", {**EMULATED, "cpu_backend": "torch", "cache": "lru"}),
    "captured": ("mixtral", {**EMULATED, "cpu_backend": "torch", "dense": "dequantised"}),
    "two engines, one pool": ("mixtral", {**EMULATED, "cpu_backend": "kt", "rules": "two engines"}),
}
TWO_ENGINES = """
- match: {name: "layers\\\\.0\\\\.mlp\\\\.experts$"}
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
    kwargs: {prefill_device: "cuda:0", generate_device: "cuda:0"}
- match: {name: "layers\\\\.1\\\\.mlp\\\\.experts$"}
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
    kwargs: {prefill_device: "cuda:1", generate_device: "cuda:1"}
"""


class Streamed(BaseStreamer):  # type: ignore[misc]
    """Collects what is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


class Question(NamedTuple):
    """A prompt, and how the answer is made."""

    prompt: torch.Tensor
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    streamed: bool = False

    def ask(self, model: Any) -> list[int]:
        streamer = Streamed() if self.streamed else None
        found = model.generate(
            self.prompt,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            streamer=streamer,
            **self.options,
        )
        tokens: list[int] = found.flatten().tolist()
        assert streamer is None or streamer.tokens == tokens
        return tokens


class Case(NamedTuple):
    model: Any
    questions: list[Question]
    alone: list[list[int]]


def questions(model: Any, decided: bool) -> list[Question]:
    """Of different lengths and ways.

    Args:
        decided: whether an expert is always computed at the same place: then near ties do no harm.
    """
    found, seed = [], 0
    while len(found) < THREADS:
        seed += 1
        length = 3 + 5 * seed % 17
        batch = 2 if len(found) == 3 else 1
        question = Question(tiny.tokens(length, seed, batch=batch))
        if len(found) == 1 and decided:
            question = question._replace(options={"num_beams": 2})
        elif len(found) == 2:
            question = question._replace(options={"prompt_lookup_num_tokens": 2})
        elif len(found) == 4:
            question = question._replace(streamed=True)
        if decided or clear(model, question.prompt):
            found.append(question)
    return found


def clear(model: Any, prompt: torch.Tensor) -> bool:
    """Whether no choice on the way is a near tie."""
    found = model.generate(
        prompt,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best, second = torch.stack(found.scores).topk(2).values.unbind(-1)
    gaps = best - second
    return bool(gaps.min() > GAP)


def load(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    family, choices = KINDS[kind]
    settings = {"dtype": "float32", **choices}
    path = folder / "model.gguf"
    tiny.write_quantised(path, family)
    if "rules" in settings:
        rules = folder / "rules.yaml"
        rules.write_text(TWO_ENGINES)
        settings["rules"] = rules
    if kind == "captured":
        patch.setattr(layer_buffers, "FIRST_CAPACITY", 16)
        patch.setattr(connect, "capture_for", lambda _device: Replayed())
    model, _ = load_model(None, path, progress=False, **settings)
    return model
