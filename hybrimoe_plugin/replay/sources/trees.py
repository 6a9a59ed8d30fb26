"""A draft's token trees, each verified in one pass: a few rows are accepted, the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hybrimoe_plugin.policy.step import Rows
from hybrimoe_plugin.replay.sources.conversations import Pass, decode_steps, stacked
from hybrimoe_plugin.replay.trace import Call, Trace

DEEPEST = 8
"""Most draft tokens behind one another."""
NEARBY = 16
"""Tokens before a tree from which half of its rejected rows are taken."""


def trees(trace: Trace, rows: int, steps: int, share: float = 0.7, seed: int = 0) -> Trace:
    """Passes that verify a draft's tree of `rows` nodes; behind the text's end it begins anew.

    Row 0 is the root: the last sure token. The draft's accepted rows are the next tokens of the
    text, in order, at places drawn at random; the token behind them is the next tree's root. The
    number of them is geometric: each position is accepted with probability `share` if the one
    before was, at most `DEEPEST`.

    What a router makes of a rejected token no trace tells. Such a row is another token of the same
    text with its whole routing through all layers: half of them from the `NEARBY` tokens before the
    tree, since siblings share their context, half from anywhere else, since they are other words.
    No token is in a tree twice unless the text is too short.

    Args:
        rows: T of every pass, the root included.
        steps: passes.
        share: probability that a position of the draft is accepted.
        seed: what is drawn.

    Raises:
        ValueError: no row, or a trace that has no pass of one token.
    """
    text = decode_steps(trace)
    if rows < 1 or not text:
        raise ValueError(f"a tree of {rows} rows cannot be cut from {len(text)} tokens of decode")
    rng = np.random.default_rng([seed, rows])
    sure = np.arange(rows) == 0
    calls: list[Call] = []
    root = reading = 0
    for _ in range(steps):
        most = min(rows - 1, DEEPEST, len(text) - 1 - root)
        right = int((rng.random(most) < share).cumprod().sum())
        path = range(root, root + 1 + right)
        accepted = np.zeros(rows, dtype=np.bool_)
        accepted[0] = True
        accepted[1 + rng.permutation(rows - 1)[:right]] = True
        order = np.empty(rows, dtype=np.int64)
        order[accepted] = path
        order[~accepted] = _others(len(text), path, rows - len(path), rng)
        passes: Sequence[Pass] = [text[token] for token in order]
        owners = np.full(rows, reading)
        for call in stacked(passes, Rows(owners, sure)):
            calls.append(call._replace(accepted=accepted))
        root = path.stop
        if root == len(text):
            root, reading = 0, reading + 1
    source = f"draft trees of {rows} rows, share {share}, seed {seed}: {trace.header.source}"
    return Trace(replace(trace.header, source=source), calls)


def _others(tokens: int, path: range, count: int, rng: np.random.Generator) -> list[int]:
    """Tokens of a text that stand for rejected ones, in any order.

    Args:
        tokens: of the text.
        path: the tree's true tokens.
        count: how many to draw.
    """
    before = [(path.start - back) % tokens for back in range(1, NEARBY + 1)]
    near = [token for token in dict.fromkeys(before) if token not in path]
    nearby = set(near)
    far = [token for token in range(tokens) if token not in path and token not in nearby]
    few = min(len(near), (count + int(rng.integers(2))) // 2)
    found = rng.permutation(near)[:few].tolist() + rng.permutation(far)[: count - few].tolist()
    while len(found) < count:  # A short text has to repeat itself.
        found.append(int(rng.integers(tokens)))
    return [int(token) for token in rng.permutation(found)]
