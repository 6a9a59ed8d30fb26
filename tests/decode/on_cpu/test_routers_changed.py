"""Routers that are changed after their layer's graph was built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from steps import prefill, step

from hybrimoe_plugin import load_model

needs.kt_kernel()
needs.operations()

PROMPT, TOKENS = tiny.tokens(5), tiny.tokens(4, seed=1)
ONE_GROUP = {"n_group": 1, "topk_group": 1}
"""The routers of DeepSeek-V3 that a graph can have."""


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Any]]:
    """A model of compiled operations, and one of ggml's graphs."""
    changes = ONE_GROUP if request.param == "deepseek_v3" else {}
    path = tiny.write(tmp_path, request.param, types=lambda name: "F32", changes=changes)
    made = [
        load_model(None, path, progress=False, accelerator="none", cpu_backend=backend)[0]
        for backend in ("auto", "ggml")
    ]
    yield made
    for model in made:
        model.hybrimoe.close()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    cache = prefill(model, PROMPT)
    return torch.cat(
        [step(model, TOKENS[:, at : at + 1], cache).logits for at in range(TOKENS.shape[1])]
    )


def router(model: Any) -> Any:
    return model.model.layers[1].mlp.gate


def alike(models: list[Any]) -> torch.Tensor:
    found = logits(models[0])
    torch.testing.assert_close(found, logits(models[1]), rtol=1e-4, atol=1e-4)
    return found


def test_its_weights_are_other_memory(models: list[Any]) -> None:
    before = alike(models)
    for model in models:
        weight = router(model).weight
        weight.data = weight.data.flip(0).contiguous()
    assert not torch.equal(alike(models), before)


def test_its_forward_is_another(models: list[Any]) -> None:
    before = alike(models)
    for model in models:
        gate = router(model)
        forward = gate.forward

        def doubled(hidden: torch.Tensor, forward: Any = forward) -> Any:
            logits, weights, ids = forward(hidden)
            return logits, 2 * weights, ids

        gate.forward = doubled
    assert not torch.equal(alike(models), before)


def test_its_correction_is_another(models: list[Any]) -> None:
    before = alike(models)
    for model in models:
        gate = router(model)
        if not hasattr(gate, "e_score_correction_bias"):
            pytest.skip("it has none")
        gate.e_score_correction_bias = 5 * gate.e_score_correction_bias.flip(0)
    assert not torch.equal(alike(models), before)


def test_it_chooses_fewer(models: list[Any]) -> None:
    before = alike(models)
    for model in models:
        router(model).top_k = 1
    assert not torch.equal(alike(models), before)


def test_a_row_of_its_weights_is_no_number(models: list[Any]) -> None:
    """That expert is chosen, so that it shows."""
    alike(models)
    for model in models:
        with torch.no_grad():
            router(model).weight[3] = float("nan")
    assert all(logits(model).isnan().all() for model in models)
