"""Sequences that are decoded together, padded on the left to one length."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from graphed import cuda_layers_of
from steps import step

from hybrimoe_plugin.compute.attention.kv_cache import cache_in


def padded(rows: int, longest: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths and their mask, each [rows, longest]."""
    ids = tiny.tokens(longest, seed, rows)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row % longest] = 0
    return ids, mask


def batches_of(model: Any) -> list[Any]:
    """What each layer has of a number of sequences; None where it has nothing."""
    return [layer.others.batch for layer in cuda_layers_of(model)]  # type: ignore[attr-defined]


def sizes_of(model: Any) -> list[int]:
    """The number of sequences for which each layer has graphs that are proved; 0 without."""
    return [layer.others.captured_sequences for layer in cuda_layers_of(model)]  # type: ignore[attr-defined]


class Batch:
    """Several greedy answers made step by step with one cache."""

    def __init__(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model = model
        self.ids = ids
        self.mask = mask
        self.cache: Any = None

    def step(self) -> torch.Tensor:
        """Logits [rows, V] of the next tokens, which are chosen by them."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        given = {"attention_mask": self.mask, "position_ids": positions}
        with torch.no_grad():
            if self.cache is None:
                output = self.model(self.ids, use_cache=True, **given)
            else:
                output = step(self.model, self.ids, self.cache, **given)
        self.cache = cache_in(output)
        logits: torch.Tensor = output.logits[:, -1]
        self.ids = logits.argmax(dim=-1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)
        return logits

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences, each of which may be there more than once."""
        chosen = torch.tensor(rows)
        self.ids, self.mask = self.ids[chosen], self.mask[chosen]
        self.cache.reorder_cache(chosen)


class Both:
    """The same batch on a model and on its plain twin."""

    def __init__(self, model: Any, plain: Any, rows: int, longest: int = 7, seed: int = 0) -> None:
        given = padded(rows, longest, seed)
        self.ours, self.plain = Batch(model, *given), Batch(plain, *given)

    def steps(self, count: int) -> None:
        """Logits are compared at each step."""
        for _ in range(count):
            torch.testing.assert_close(self.ours.step(), self.plain.step())

    def keep(self, rows: list[int]) -> None:
        for batch in (self.ours, self.plain):
            batch.keep(rows)
