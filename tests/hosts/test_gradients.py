"""Gradients through an injected model are those of the plain one, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from loading import injected, plain
from uses import IDS, quantised, stored_mixtral

from hybrimoe_plugin.errors import BackendError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_mixtral(tmp_path_factory)


RIGHT: dict[str, dict[str, Any]] = {
    "torch": {"cpu_backend": "torch"},
    "torch, dense plain": {"cpu_backend": "torch", "dense": "plain"},
}
REFUSED: dict[str, dict[str, Any]] = {
    "emulated": {"cpu_backend": "torch", "accelerator": "emulated", "cache_ratio": 0.5},
    "ggml, dense plain": {"cpu_backend": "ggml", "dense": "plain"},
    "ggml, linears plain": {"cpu_backend": "ggml", "linears": "plain"},
    "kt-kernel": {"cpu_backend": "kt", "dense": "plain"},
    "matrices as stored": {"cpu_backend": "torch", "linears": "quantised"},
}


def loss_and_weight(model: Any) -> tuple[torch.Tensor, Any]:
    """A loss, and the only weight that asks for a gradient: one at the model's beginning."""
    model.requires_grad_(False)
    weight = model.model.layers[0].input_layernorm.weight
    weight.requires_grad_(True)
    return model(IDS, labels=IDS).loss, weight


@pytest.mark.parametrize("way", sorted(RIGHT))
def test_gradients_are_right(way: str, stored: Path) -> None:
    model = injected(stored, **RIGHT[way])
    gradients = []
    for each in (model, plain(stored)):
        loss, weight = loss_and_weight(each)
        loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)
    model.hybrimoe.close()


@pytest.mark.parametrize("way", sorted(REFUSED))
def test_gradients_are_refused(way: str, stored: Path) -> None:
    if way != "emulated":
        needs.kt_kernel()
    model = injected(stored, **REFUSED[way])
    loss, weight = loss_and_weight(model)
    with pytest.raises(BackendError, match="without gradients"):
        loss.backward()
    assert weight.grad is None
    model.hybrimoe.close()


def test_a_bias_inside_a_graph_has_no_gradient_either(tmp_path: Path) -> None:
    needs.kt_kernel()
    model = injected(
        tiny.write(tmp_path, "qwen2_moe", types=quantised),
        linears="quantised",
        cpu_backend="torch",
    ).requires_grad_(False)
    attention = model.model.layers[1].self_attn
    attention.k_proj.bias.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)  # else no loss would ask for gradients
    with pytest.raises(BackendError, match="a matrix as stored"):
        model(IDS, labels=IDS).loss.backward()
    model.hybrimoe.close()
