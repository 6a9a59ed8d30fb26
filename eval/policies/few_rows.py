"""Calls of a few rows, on every trace: conversations decoded together, and trees of a draft."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from eval.policies import traces
from hybrimoe_plugin.replay.sources import interleaved, lengths, stretches, trees
from hybrimoe_plugin.replay.trace import Call, Trace

CONVERSATIONS, TREE = "conversations", "tree"
KINDS = (CONVERSATIONS, TREE)
LENGTH = 16
"""Mean tokens of a conversation: several end while a trace is judged."""
DRAFTED_TEXT = 128
"""Tokens of a generated text that trees are cut from."""
FIRST_TEXT = 100
"""Number of the first generated text; lower ones place the first experts."""


@lru_cache(maxsize=2)
def routing(name: str, kind: str, rows: int, steps: int, start: int) -> Trace:
    """Steps of `rows` rows each on the trace of a name, without a prompt.

    Conversations are different texts where routing is generated, and different stretches of the
    same answer where it is real: those hold one text each.

    Args:
        kind: one of `KINDS`.
        start: which texts, stretches or trees.
    """
    generated = name in traces.SHAPES
    first = FIRST_TEXT * (1 + start)
    if kind == TREE:
        text = traces.make_flat(name, 0, DRAFTED_TEXT, first) if generated else traces.real(name)
        return trees(text, rows, steps, seed=start)
    if generated:
        counted = lengths(rows, steps, LENGTH, start)
        conversations = [
            traces.make_flat(name, 0, tokens, first + number)
            for number, tokens in enumerate(counted)
        ]
    else:
        conversations = stretches(traces.real(name), rows, steps, LENGTH, start)
    return interleaved(conversations, rows, steps)


def gained(group: Sequence[Call]) -> int:
    """Tokens that the texts gain in one pass: all rows, or those that a verification accepts."""
    first = group[0]
    return len(first.ids) if first.accepted is None else int(first.accepted.sum())
