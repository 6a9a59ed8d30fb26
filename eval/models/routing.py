"""Routing for a synthetic model: recorded on a real model, or generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from eval.models.shapes import Model
from eval.policies import traces
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.replay.sources import Popularity, counts, with_predictions
from hybrimoe_plugin.replay.trace import Call, Trace, TraceHeader

PROMPTS = 4
"""Number of different prompts, used in turn: one alone, again and again, would find its own experts
in every cache that learns.
"""


Number = TypeVar("Number", np.int64, np.float32)


class Routing(NamedTuple):
    """Prompts and the tokens after the first one; all layers see the same tokens."""

    prompts: list[list[Call]]
    decode: list[list[Call]]
    header: TraceHeader
    popularity: Popularity
    """[L, E] of tokens that are not in `decode`, by which every system places its first experts."""


class Wanted(NamedTuple):
    """How much of a record is used."""

    prompt_tokens: int
    decode_tokens: int
    look_ahead: int


def routing(
    model: Model,
    prompt_tokens: int,
    decode_tokens: int,
    look_ahead: int,
    recall: float,
) -> Routing:
    """The model's routing with predictions for `look_ahead` layers.

    Predictions are recorded ones where there are any, else modelled. A recorded prompt that is too
    short is continued with the recorded answer, whose tokens then appear again in decode; further
    prompts are later windows of the same record.

    Args:
        recall: of modelled predictions.
    """
    wanted = Wanted(prompt_tokens, decode_tokens, look_ahead)
    variants = [_variant(model, wanted, number, recall) for number in range(PROMPTS)]
    passes = [list(trace.passes()) for trace in variants]
    header = variants[0].header
    if model.like:
        size = load_profile(f"a6000-{model.like}").spec.expert_bytes
        header = replace(header, expert_bytes=size)
    prompts = [groups[0] for groups in passes]
    decode = passes[0][1:]
    return Routing(prompts, decode, header, _elsewhere(model, decode_tokens, header))


def published_costs(model: Model) -> CostModel:
    """Costs of the model's experts on the paper's machine."""
    name = model.like or model.trace
    trace = traces.flat(name, 16, 4, 0) if name in traces.SHAPES else traces.real(name)
    return traces.costs_for("a6000", trace, name)


def _variant(model: Model, wanted: Wanted, number: int, recall: float) -> Trace:
    """One prompt with its answer.

    Args:
        number: which of the prompts, from 0.
        recall: of modelled predictions.
    """
    if model.trace in traces.SHAPES:
        tokens = wanted.prompt_tokens, wanted.decode_tokens
        trace = traces.flat(model.trace, *tokens, text=number)
    else:
        trace = _recorded(traces.real(model.trace), wanted, number)
    if wanted.look_ahead and trace.header.predictions == "none":
        return with_predictions(trace, recall, wanted.look_ahead, seed=number)
    return trace


def _elsewhere(model: Model, decode_tokens: int, header: TraceHeader) -> Popularity:
    """Popularity in the rest of a recorded answer, or in another generated text."""
    if model.trace in traces.SHAPES:
        return traces.other_text(traces.flat(model.trace, 16, 4, 0), model.trace)
    answer = _single_tokens(list(traces.real(model.trace).passes()))
    calls = []
    for group in answer[decode_tokens:]:
        calls += [call for call in group if call.layer < header.layers]
    return counts(calls, header)


def _recorded(trace: Trace, wanted: Wanted, window: int) -> Trace:
    """Prompt and answer of a recorded run, without scores.

    The layer that lacks most of the prompt is left out.

    Args:
        window: which part of the record is the prompt, 0 to PROMPTS - 1.
    """
    groups = list(trace.passes())
    prompt = groups[0]
    answer = _single_tokens(groups[1:])
    tokens = len(prompt[0].ids)
    whole = [call.layer for call in prompt if len(call.ids) == tokens]
    calls = []
    for layer in whole:
        rows = [call for group in (prompt, *answer) for call in group if call.layer == layer]
        calls.append(_window(rows, wanted, window))
    for group in answer[: wanted.decode_tokens]:
        for call in group:
            if call.layer in whole:
                predicted = call.predicted[: wanted.look_ahead]
                calls.append(call._replace(scores=None, predicted=predicted))
    return Trace(replace(trace.header, layers=len(whole)), calls)


def _window(rows: Sequence[Call], wanted: Wanted, window: int) -> Call:
    """One call of `prompt_tokens` tokens, cut from all of a layer's calls.

    Args:
        window: which part, 0 to PROMPTS - 1; the last one ends with the last token.
    """
    total = sum(len(call.ids) for call in rows)
    room = max(0, total - wanted.prompt_tokens)
    first = window * room // (PROMPTS - 1)
    part = slice(first, first + wanted.prompt_tokens)

    def cut(arrays: Sequence[NDArray[Number]]) -> NDArray[Number]:
        return np.concatenate(arrays)[part]

    ids = cut([call.ids for call in rows])
    weights = cut([call.weights for call in rows])
    by_call = [call.predicted[: wanted.look_ahead] for call in rows]
    predicted = [cut(arrays) for arrays in zip(*by_call, strict=True)]
    return Call(rows[0].layer, ids, weights, None, tuple(predicted))


def _single_tokens(groups: Sequence[list[Call]]) -> list[list[Call]]:
    """The passes of one token."""
    return [group for group in groups if len(group[0].ids) == 1]
