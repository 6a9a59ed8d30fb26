"""Refuse values of a request that transformers or torch would trip over."""

from __future__ import annotations

import math
from typing import Any

from hybrimoe_plugin.serve.requests import Sampling
from hybrimoe_plugin.serve.sampling.errors import SamplingError


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Raise SamplingError, naming the field, for values that make no sense.

    Args:
        vocabulary: tokens that the model has logits for.
    """
    _number("temperature", sampling.temperature, 0.0, math.inf)
    _number("top_p", sampling.top_p, 0.0, 1.0)
    _number("min_p", sampling.min_p, 0.0, 1.0)
    _number("repetition_penalty", sampling.repetition_penalty, 1e-3, 1e3)
    _number("presence_penalty", sampling.presence_penalty, -math.inf, math.inf)
    _number("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf)
    _whole("top_k", sampling.top_k)
    _whole("min_tokens", sampling.min_tokens)
    if sampling.logprobs is not None:
        _whole("logprobs", sampling.logprobs)
    if sampling.seed is not None and type(sampling.seed) is not int:
        raise SamplingError(f"seed is {sampling.seed!r:.80}, where an integer is expected")
    for token in sampling.stop_token_ids:
        _token("stop_token_ids", token, vocabulary)
    for token, bias in sampling.logit_bias.items():
        _token("logit_bias", token, vocabulary)
        _number(f"logit_bias of token {token}", bias, -math.inf, math.inf)
    if sampling.grammar is not None and sampling.ignore_eos:
        raise SamplingError("ignore_eos leaves no way to end a text that follows a grammar")


def _number(name: str, value: Any, low: float, high: float) -> None:
    try:
        right = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    except OverflowError:  # an integer that no float can hold
        right = False
    if not right:
        bounds = "finite" if low == -math.inf else f"at least {low:g}"
        bounds += "" if high == math.inf else f" and at most {high:g}"
        raise SamplingError(f"{name} is {_shown(value)}, where a number is expected, {bounds}")


def _whole(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise SamplingError(f"{name} is {_shown(value)}, where an integer from 0 is expected")


def _token(name: str, value: Any, vocabulary: int) -> None:
    if type(value) is not int or not 0 <= value < vocabulary:
        raise SamplingError(
            f"{name} names token {_shown(value)}, where ids are 0 to {vocabulary - 1}"
        )


def _shown(value: Any) -> str:
    """A value for a message; Python refuses to print integers of very many digits."""
    if type(value) is int and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    return f"{value!r:.80}"
