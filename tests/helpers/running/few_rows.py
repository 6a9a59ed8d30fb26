"""Calls of a few rows on a model with its KV cache: a batch of conversations, a draft's tree.

Whoever runs them gives the same logits for the same seed, the plain model and one with operators.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import tiny
import torch
from steps import step

from hybrimoe_plugin.compute.attention.kept_entries import cut_entries
from hybrimoe_plugin.compute.attention.kv_cache import cache_in

ROWS = (1, 2, 3, 4, 8, 16, 32, 33)
"""32 is the most that counts as few, 33 a prompt."""

GAP = 1e-5
"""Least distance between the scores of the last expert that is chosen and the next one.

Where an expert computes changes the rounding, and with it which of two that are all but tied is
chosen.
"""

Run = Callable[..., list[torch.Tensor]]
"""`conversations` or `trees`."""


class Batch:
    """Conversations of different lengths that are decoded together, padded on the left.

    Args:
        prompts: ids [S] of each, of any length.
    """

    def __init__(self, model: Any, prompts: Sequence[torch.Tensor]) -> None:
        self._model = model
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            self.mask[row, longest - len(prompt) :] = 1
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        out = model(ids, attention_mask=self.mask, position_ids=positions, use_cache=True)
        self.cache = cache_in(out)
        self.logits = out.logits[self.mask.bool()]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] behind one more token [R] of each conversation."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        positions = self.mask.sum(1, keepdim=True) - 1
        out = step(
            self._model,
            ids[:, None],
            self.cache,
            attention_mask=self.mask,
            position_ids=positions,
        )
        logits: torch.Tensor = out.logits[:, 0]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """End all other conversations."""
        chosen = torch.tensor(rows)
        self.mask = self.mask[chosen]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]

    def join(self, other: Batch) -> None:
        """Take in conversations that hold no more tokens than these."""
        missing = self.mask.shape[1] - other.mask.shape[1]
        pad = torch.nn.functional.pad
        self.mask = torch.cat([self.mask, pad(other.mask, (missing, 0))])
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            keys, values = (
                pad(theirs.keys, (0, 0, missing, 0)),
                pad(theirs.values, (0, 0, missing, 0)),
            )
            ours.keys = torch.cat([ours.keys, keys])
            ours.values = torch.cat([ours.values, values])


@torch.no_grad()
def conversations(model: Any, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Logits of every call: a prompt each, steps, one ends, a step, another joins, steps."""
    rng = random.Random(seed)
    prompts = [tiny.tokens(rng.randint(2, 6), seed + row)[0] for row in range(rows)]
    prompts[0] = tiny.tokens(6, seed)[0]
    batch = Batch(model, prompts)
    fed = tiny.tokens(rows, seed + 100, batch=4)
    found = [batch.logits, batch.step(fed[0]), batch.step(fed[1])]
    if rows > 1:
        ended = rng.randrange(rows)
        batch.keep([row for row in range(rows) if row != ended])
        found.append(batch.step(fed[2, 1:]))
        joining = Batch(model, [tiny.tokens(5, seed + 200)[0]])
        batch.join(joining)
        found += [joining.logits, batch.step(fed[3])]
    return found


class Tree:
    """A draft's tree behind a conversation; row 0 is its root, which is always right.

    Args:
        seed: of tokens and parents.
    """

    def __init__(self, rows: int, seed: int) -> None:
        rng = random.Random(seed)
        self.ids = tiny.tokens(rows, seed + 300)
        self.parents = [-1, *(rng.randrange(row) for row in range(1, rows))]
        self.accepted = [0]
        """A path from the root, by row."""
        for row in range(1, rows):
            if self.parents[row] == self.accepted[-1] and rng.random() < 0.6:
                self.accepted.append(row)

    def path(self, row: int) -> list[int]:
        """The rows from the root to this one."""
        above = [] if row == 0 else self.path(self.parents[row])
        return [*above, row]

    def call(self, model: Any, cache: Any) -> torch.Tensor:
        """Logits [R, V] of all rows. Mutates: the cache, which then holds the accepted path."""
        past, rows = cache.get_seq_length(), self.ids.shape[1]
        paths = [self.path(row) for row in range(rows)]
        mask = torch.full((1, 1, rows, past + rows), torch.finfo(torch.float32).min)
        mask[..., :past] = 0
        for row, path in enumerate(paths):
            mask[0, 0, row, past + torch.tensor(path)] = 0
        positions = torch.tensor([[past + len(path) - 1 for path in paths]])
        out = step(model, self.ids, cache, attention_mask=mask, position_ids=positions)
        for place, row in enumerate(self.accepted, past):
            for layer in cache.layers:
                layer.keys[:, :, place] = layer.keys[:, :, past + row]
                layer.values[:, :, place] = layer.values[:, :, past + row]
        for layer in cache.layers:
            cut_entries(layer, past + len(self.accepted))
        logits: torch.Tensor = out.logits[0]
        return logits


@torch.no_grad()
def trees(model: Any, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Logits of every call: a prompt, two trees, one token."""
    out = model(tiny.tokens(5, seed), use_cache=True)
    cache = cache_in(out)
    found = [out.logits[0]]
    for turn in range(2):
        tree = Tree(rows, seed + 50 * turn)
        found.append(tree.call(model, cache))
    found.append(step(model, tiny.tokens(1, seed + 400), cache).logits[0])
    return found


def decided(model: Any, run: Run, rows: int, seed: int = 0) -> tuple[int, list[torch.Tensor]]:
    """The first seed from this one on with which no choice of experts is a near tie.

    Args:
        model: a plain one.

    Returns:
        the seed, and the logits of every call.
    """
    gaps: list[float] = []

    def note(_gate: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
        scores, *_, ids = output
        last = ids.shape[-1]
        best = scores.topk(last + 1).values
        gaps.append(float((best[:, -2] - best[:, -1]).min()))

    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(note) for gate in gates]
    while True:
        found = run(model, rows, seed)
        if min(gaps) > GAP:
            break
        gaps.clear()
        seed += 1
    for hook in hooks:
        hook.remove()
    return seed, found


def check_same(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], **close: Any) -> None:
    """Every call's logits are the same."""
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
