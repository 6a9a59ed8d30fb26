"""The KV cache after a verified tree: what plain decoding leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hybrimoe_plugin.compute.attention.kept_entries import KeptEntries
from lever_ext.speculation.verify import Verified, Verifier
from lever_ext.target import load_target
from lever_ext.tree.token_tree import TokenTree
from tests.lever.helpers import (
    a_gate,
    prompt,
)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_compacted_cache_equals_recomputation(family: str, plain_models: dict[str, Any]) -> None:
    model, ids = plain_models[family], prompt(4)
    verifier, cache = Verifier(model), DynamicCache(config=model.config)
    verifier.prefill(ids[:, :-1], cache)
    tree = TokenTree(
        (int(ids[0, -1]), 5, 6, 7, 8, 9), (-1, 0, 0, 2, 2, 4), (1.0,) * 6, tuple(range(6))
    )
    verified = verifier.verify(tree, cache)
    path = [0, 2, 4, 5]
    plain = torch.cat([ids, torch.tensor([[6, 8, 9]])], 1)
    again = DynamicCache(config=model.config)
    with torch.no_grad():
        want = model.base_model(
            plain, use_cache=True, **{verifier.cache_name: again}
        ).last_hidden_state
    torch.testing.assert_close(verified.hidden[0, path], want[0, -4:])
    keep_path(verifier, cache, verified, path)
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def keep_path(
    verifier: Verifier, cache: DynamicCache, verified: Verified, path: Sequence[int]
) -> None:
    kept = KeptEntries(cache)
    for depth, row in enumerate(path):
        verifier.place(cache, verified, row, depth)
        kept.keep(verified.past + depth + 1)
    kept.drop_rest()


def test_pruned_rows_leave_no_trace_in_the_cache(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    target = load_target(packs["llama"])
    gate = a_gate(plain_models["llama"], threshold=0.9)
    target.set_gate(gate)
    verifier, cache, ids = (
        Verifier(target.model, gate),
        DynamicCache(config=target.model.config),
        prompt(4),
    )
    verifier.prefill(ids[:, :-1], cache)
    tree = TokenTree(
        (int(ids[0, -1]), 5, 6, 7, 8, 9), (-1, 0, 0, 1, 2, 4), (1.0,) * 6, tuple(range(6))
    )
    verified = verifier.verify(tree, cache, [[5, 6, 30], [7], [8], [], [9], []])
    assert 0 < len(verified.row_of) < 6
    path = tree.path(max(verified.row_of))
    keep_path(verifier, cache, verified, path)
    again = DynamicCache(config=target.model.config)
    whole = torch.cat([ids[:, :-1], torch.tensor([[tree.tokens[row] for row in path]])], 1)
    Verifier(plain_models["llama"]).prefill(whole, again)
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
    target.close()
