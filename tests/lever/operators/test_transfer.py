"""Inputs that follow the layers between CPU and accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lever_ext.operators.transfer import LayerTransfer


def test_hidden_states_masks_and_kv_change_sides_with_the_layers() -> None:
    """Torch's own fake tensors refuse operations on tensors of two devices, without having the
    second one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    there = [False, True, True, False]
    transfer = LayerTransfer(torch.device("cuda:0"), there)

    def toy(index: int, weight: torch.Tensor) -> Any:
        def layer(
            hidden: torch.Tensor, position_embeddings: Any, cache: DynamicCache, **named: Any
        ) -> torch.Tensor:
            cos, sin = position_embeddings
            state = torch.matmul(hidden, weight) * cos + sin
            keys, values = cache.update(state.unsqueeze(1), state.unsqueeze(1), index)
            shares = torch.matmul(state, keys.squeeze(1).transpose(1, 2)) + named["attention_mask"]
            return torch.matmul(shares, values.squeeze(1))

        return layer

    with FakeTensorMode():
        layers = [
            toy(i, torch.empty(8, 8, device="cuda:0" if away else "cpu"))
            for i, away in enumerate(there)
        ]
        with pytest.raises(RuntimeError, match="two (different )?devices"):
            torch.empty(2, device="cuda:0") + torch.empty(2)
        cache = DynamicCache()
        for step in range(3):
            hidden, rotary = torch.empty(1, 5, 8), (torch.empty(1, 5, 8), torch.empty(1, 5, 8))
            named = {
                "attention_mask": torch.empty(1, 5, 5 + 5 * step),
                "position_embeddings": rotary,
                "cache": cache,
            }
            for index, layer in enumerate(layers):
                hidden = transfer.run(index, layer, (hidden,), named)
                assert (hidden.device.type == "cuda") == (there[index] and index < 3)
            assert [layer.keys.device.type == "cuda" for layer in cache.layers] == there
            # KV that another split left on the other side comes along.
            for layer, side in ((cache.layers[1], "cpu"), (cache.layers[3], "cuda:0")):
                layer.keys, layer.values = layer.keys.to(side), layer.values.to(side)
