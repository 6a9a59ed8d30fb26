"""Injected models whose decode steps go through a stand-in for CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from replayed import Replayed
from steps import step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.decode import connect
from hybrimoe_plugin.decode.cuda_layer import CudaLayer
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer

STEPS = 44


class Loader:
    """Loads models whose decoding goes through the given capture; `close` closes all of them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._patch = patch
        self._models: list[Any] = []

    def __call__(self, family: str, capture: Replayed | None, **settings: Any) -> Any:
        self._patch.setattr(connect, "capture_for", lambda device: capture)
        choices = {
            "accelerator": "emulated",
            "dense": "dequantised",
            "cpu_backend": "torch",
            "cache_ratio": 0.5,
            "dtype": "float32",
        }
        path = tiny.write(self._folder, family)
        model, _ = load_model(None, path, progress=False, **{**choices, **settings})
        self._models.append(model)
        return model

    def close(self) -> None:
        for model in self._models:
            model.hybrimoe.close()


def greedy(model: Any, prompt: torch.Tensor, steps: int = STEPS, **options: Any) -> list[int]:
    answer = model.generate(
        prompt,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return [int(token) for token in answer[:, prompt.shape[1] :].flatten()]


def layers_of(model: Any) -> list[GraphedLayer]:
    return [module for module in model.modules() if isinstance(module, GraphedLayer)]


def cuda_layers_of(model: Any) -> list[CudaLayer]:
    calls = [layer.layer_call for layer in layers_of(model)]
    assert all(isinstance(call, CudaLayer) for call in calls)
    return calls  # type: ignore[return-value]


class Sequence:
    """A greedy answer made step by step, with a cache of its own."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model = model
        self._ids = tiny.tokens(7, seed)
        self._cache: Any = None
        self.tokens: list[int] = []

    def step(self) -> None:
        with torch.no_grad():
            output = (
                self._model(self._ids, use_cache=True)
                if self._cache is None
                else step(self._model, self._ids, self._cache)
            )
        self._cache = cache_in(output)
        self._ids = output.logits[:, -1:].argmax(dim=-1)
        self.tokens.append(int(self._ids))
