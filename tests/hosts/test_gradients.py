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


GRADIENTS: dict[str, tuple[dict[str, Any], bool]] = {
    "torch": ({"cpu_backend": "torch"}, True),
    "torch, dense plain": ({"cpu_backend": "torch", "dense": "plain"}, True),
    "emulated": ({"cpu_backend": "torch", "accelerator": "emulated", "cache_ratio": 0.5}, False),
    "ggml, dense plain": ({"cpu_backend": "ggml", "dense": "plain"}, False),
    "ggml, linears plain": ({"cpu_backend": "ggml", "dense": "dequantised"}, False),
    "kt-kernel": ({"cpu_backend": "kt", "dense": "plain"}, False),
    "matrices as stored": ({"cpu_backend": "torch", "dense": "quantised"}, False),
}


@pytest.mark.parametrize("way", sorted(GRADIENTS))
def test_gradients_are_right_or_refused(way: str, stored: Path) -> None:
    settings, right = GRADIENTS[way]
    if not right and way != "emulated":
        needs.kt_kernel()
    right = plain(stored)
    model = injected(stored, **settings)
    found = []
    for each in (model, right):
        each.requires_grad_(False)
        weight = each.model.layers[0].input_layernorm.weight.requires_grad_(True)
        loss = each(IDS, labels=IDS).loss
        if each is model and not right:
            with pytest.raises(BackendError, match="without gradients"):
                loss.backward()
            assert weight.grad is None
        else:
            loss.backward()
            found.append(weight.grad)
    if right:
        torch.testing.assert_close(*found)
    model.hybrimoe.close()


def test_a_bias_inside_a_graph_has_no_gradient_either(tmp_path: Path) -> None:
    needs.kt_kernel()
    model = injected(
        tiny.write(tmp_path, "qwen2_moe", types=quantised),
        dense="quantised",
        cpu_backend="torch",
    ).requires_grad_(False)
    attention = model.model.layers[1].self_attn
    attention.k_proj.bias.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)  # else no loss would ask for gradients
    with pytest.raises(BackendError, match="a matrix as stored"):
        model(IDS, labels=IDS).loss.backward()
    model.hybrimoe.close()
