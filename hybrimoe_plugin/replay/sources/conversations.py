"""Conversations that a server decodes together: one row of each in every layer call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from hybrimoe_plugin.policy.step import Rows
from hybrimoe_plugin.replay.trace import Call, Trace

SHORTEST, LONGEST = 0.5, 1.5
"""Range of a conversation's length, as a share of the mean."""

Pass = list[Call]
"""The calls of one token, one for each layer."""


def decode_steps(trace: Trace) -> list[Pass]:
    """The passes of one token: the answer, without its prompt."""
    return [group for group in trace.passes() if len(group[0].ids) == 1]


def stretches(trace: Trace, rows: int, steps: int, tokens: int, seed: int = 0) -> list[Trace]:
    """Conversations of the same model, cut from one text: enough for `interleaved`.

    Each is a stretch of the answer from a place drawn at random; behind the last token comes the
    first. A short text is thus read several times, by different conversations at different times.

    Args:
        rows, steps: how many are decoded together, and for how long.
        tokens: mean length of a conversation.
        seed: which places and lengths are drawn.

    Raises:
        ValueError: the trace has no pass of one token.
    """
    text = decode_steps(trace)
    if not text:
        raise ValueError("a trace without a token of decode has no conversations")
    rng = np.random.default_rng(seed)
    header = replace(trace.header, source=f"{trace.header.source}; stretches, seed {seed}")
    found = []
    for length in lengths(rows, steps, tokens, seed):
        start = int(rng.integers(len(text)))
        calls = [call for at in range(length) for call in text[(start + at) % len(text)]]
        found.append(Trace(header, calls))
    return found


def lengths(rows: int, steps: int, tokens: int, seed: int = 0) -> list[int]:
    """Tokens of each conversation, so that `rows` at a time last for `steps` steps.

    Those that begin together end one after the other, as if they had begun so too.

    Args:
        tokens: mean length of a conversation.
        seed: which lengths are drawn.
    """
    rng = np.random.default_rng([seed, rows])
    shortest = max(1, round(SHORTEST * tokens))
    longest = max(1, round(LONGEST * tokens))
    found: list[int] = []
    left = [0] * rows
    while (first := min(left)) < steps:
        length = int(rng.integers(shortest, longest + 1))
        if len(found) < rows:
            length = 1 + length * len(found) // rows
        left[left.index(first)] += length
        found.append(length)
    return found


def interleaved(conversations: Sequence[Trace], rows: int, steps: int | None = None) -> Trace:
    """Decode `rows` conversations together; where one ends, the next one takes its row.

    The trace ends when a row has no conversation left. Prompts are left out. Scores and predictions
    are there where all conversations have them.

    Args:
        conversations: of one model, in the order in which they begin.
        rows: T of every call.
        steps: passes at most; None for all.

    Raises:
        ValueError: too few conversations, or different models.
    """
    if not 1 <= rows <= len(conversations):
        raise ValueError(f"{rows} rows need as many conversations, found {len(conversations)}")
    header = conversations[0].header
    shape = (header.layers, header.experts, header.top_k)
    for other in conversations:
        if (other.header.layers, other.header.experts, other.header.top_k) != shape:
            raise ValueError("conversations of different models cannot share a call")
    source = f"{rows} conversations together: {header.source}"
    calls: list[Call] = []
    for owners, passes in islice(_seated(conversations, rows), steps):
        shared = Rows(np.array(owners), np.ones(rows, dtype=np.bool_))
        calls += stacked(passes, shared)
    return Trace(replace(header, source=source), calls)


def stacked(passes: Sequence[Pass], rows: Rows) -> Pass:
    """One pass of several tokens: a row of each of these passes, in this order.

    Args:
        passes: T passes of one token through the same layers.
        rows: whose tokens they are.

    Raises:
        ValueError: passes through different layers.
    """
    found = []
    for calls in zip(*passes, strict=True):
        layer = calls[0].layer
        if any(call.layer != layer for call in calls):
            raise ValueError("tokens of one pass go through the same layers")
        scores = [call.scores for call in calls if call.scores is not None]
        predicted = zip(*(call.predicted for call in calls), strict=False)
        found.append(
            Call(
                layer,
                np.concatenate([call.ids for call in calls]),
                np.concatenate([call.weights for call in calls]),
                np.concatenate(scores) if len(scores) == len(calls) else None,
                tuple(np.concatenate(ids) for ids in predicted),
                rows,
            )
        )
    return found


def _seated(conversations: Sequence[Trace], rows: int) -> Iterator[tuple[list[int], list[Pass]]]:
    """For each step, the number of the conversation in each row, and its token's calls."""
    texts = [decode_steps(conversation) for conversation in conversations]
    waiting = [number for number, text in enumerate(texts) if text]
    if len(waiting) < rows:
        return
    owners, waiting = waiting[:rows], waiting[rows:]
    read = dict.fromkeys(owners, 0)
    while True:
        yield list(owners), [texts[owner][read[owner]] for owner in owners]
        for row, owner in enumerate(owners):
            read[owner] += 1
            if read[owner] < len(texts[owner]):
                continue
            if not waiting:
                return
            owners[row] = waiting.pop(0)
            read[owners[row]] = 0
