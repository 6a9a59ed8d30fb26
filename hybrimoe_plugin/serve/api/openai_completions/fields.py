"""The fields that chat completions and completions have in common: OpenAI's and vLLM's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hybrimoe_plugin.serve.api.checks import (
    Check,
    boolean,
    checked,
    list_of,
    mapping,
    number,
    refused,
    text,
    whole,
    wrong,
)
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.requests import Sampling
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.defaults import sampling_of
from hybrimoe_plugin.serve.text.language import Language, Wanted

MOST_TOKEN = 2**31 - 1
_LONGEST_STOP = 256
"""Characters: each new text is compared with every beginning of every stop string."""
MOST_NAMED = 1024
"""Tokens in one field: each is looked at for every answer, while other requests wait."""
_TOKEN = re.compile(r"[0-9]{1,10}")


def _biases(name: str, value: Any) -> dict[int, float]:
    """Token ids, which JSON writes as strings, and what is added to their logits."""
    check = number(-100, 100)
    found = {}
    if len(mapping(name, value)) > MOST_NAMED:
        raise wrong(name, f"an object of at most {MOST_NAMED} tokens")
    for token, bias in value.items():
        if not _TOKEN.fullmatch(token):
            raise wrong(name, "an object whose keys are token ids")
        found[int(token)] = check(f"{name}.{token}", bias)
    return found


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else list_of(text)(name, value)
    if not all(0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise wrong(name, f"a string of 1 to {_LONGEST_STOP} characters, or a list of such")
    return tuple(stops)


def _top_k(name: str, value: Any) -> int:
    return max(0, int(whole(-1)(name, value)))  # -1 is for all, as in vLLM


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(list_of(whole(0, MOST_TOKEN), most=MOST_NAMED)(name, value))


COMMON: Mapping[str, Check] = {
    # Each is a field of `Sampling` too.
    "temperature": number(0, 100),
    "top_p": number(0, 1, low_excluded=True),
    "top_k": _top_k,
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 100, low_excluded=True),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": _biases,
    "min_tokens": whole(0),
    "ignore_eos": boolean,
    "stop_token_ids": _token_ids,
    "seed": whole(-(2**63), 2**63 - 1),
    # These are not.
    "max_tokens": whole(1),
    "n": whole(1),
    "stop": _stops,
    "include_stop_str_in_output": boolean,
    "skip_special_tokens": boolean,
    "stream": boolean,
    "stream_options": mapping,
    # What other servers know, and what would change the answer here.
    "use_beam_search": refused((False,)),
    "length_penalty": refused((1, 1.0)),
    "early_stopping": refused((False,)),
    "prompt_logprobs": refused(),
    "truncate_prompt_tokens": refused(),
    "allowed_token_ids": refused(),
    "bad_words": refused(([],)),
    "logits_processors": refused(([],)),
    "typical_p": refused((1, 1.0)),
    "top_a": refused((0, 0.0)),
    "tfs": refused((1, 1.0)),
    "mirostat": refused((0,)),
    "generation_config": refused(),
    "return_token_ids": refused((False,)),
    "return_tokens_as_token_ids": refused((False,)),
    "prompt_embeds": refused(),
    "spaces_between_special_tokens": refused((True,)),
}
"""Field -> its check. Fields of no table are ignored, as they are by other servers."""

_SAMPLING = frozenset(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class Options:
    """What a body asks for, whichever of the two endpoints it came to.

    Attributes:
        given: the checked fields that the body has.
        include_usage: whether a stream ends with the number of tokens.
    """

    wanted: Wanted
    given: Mapping[str, Any]
    stream: bool
    include_usage: bool


def options_of(
    body: Mapping[str, Any],
    checks: Mapping[str, Check],
    service: Service,
    logprobs: int | None,
    max_tokens: int | None,
) -> Options:
    """The checked options of a body.

    Args:
        checks: of this endpoint's own fields.
        logprobs: as of `Sampling`.
        max_tokens: where the body names no limit.

    Raises:
        ApiError: a field is wrong, of more than the server gives, or not supported.
    """
    given = checked(body, {**COMMON, **checks})
    limits = service.limits
    choices = given.get("n", 1)
    stops = given.get("stop", ())
    if choices > limits.choices:
        raise wrong("n", f"a whole number from 1 to {limits.choices}")
    if len(stops) > limits.stops:
        raise wrong("stop", f"a list of at most {limits.stops} strings")
    if logprobs is not None and logprobs > limits.logprobs:
        name = "top_logprobs" if "top_logprobs" in given else "logprobs"
        raise wrong(name, f"a whole number from 0 to {limits.logprobs}")
    _check_tokens(given, Language.of(service).prompts.vocabulary)
    drawn = {name: value for name, value in given.items() if name in _SAMPLING}
    sampling = sampling_of(service.model, {**drawn, "logprobs": logprobs})
    wanted = Wanted(
        sampling,
        given.get("max_completion_tokens", given.get("max_tokens", max_tokens)),
        choices,
        stops,
        given.get("include_stop_str_in_output", False),
        given.get("skip_special_tokens", True),
    )
    return Options(wanted, given, given.get("stream", False), _include_usage(given))


def _check_tokens(given: Mapping[str, Any], vocabulary: int | None) -> None:
    for name in ("logit_bias", "stop_token_ids"):
        for token in given.get(name, ()):
            if vocabulary is not None and token >= vocabulary:
                raise ApiError(400, f"{name}: the model has no token {token}", name)


def _include_usage(given: Mapping[str, Any]) -> bool:
    options = given.get("stream_options", {})
    name = "stream_options.include_usage"
    value = options.get("include_usage")
    return value is not None and boolean(name, value)
