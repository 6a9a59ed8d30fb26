"""Parts of answers that both endpoints have: log-probabilities and the number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails

from hybrimoe_plugin.serve.requests import Token
from hybrimoe_plugin.serve.text.spelling import Spelling

LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot write."""


def chat_logprobs(tokens: Iterable[Token], spelling: Spelling) -> list[ChatCompletionTokenLogprob]:
    """One entry a token, as in chat completions."""
    return [
        ChatCompletionTokenLogprob(
            token=spelling.text_of(token.id),
            bytes=list(spelling.bytes_of(token.id)),
            logprob=_finite(token.logprob),
            top_logprobs=[
                TopLogprob(
                    token=spelling.text_of(other),
                    bytes=list(spelling.bytes_of(other)),
                    logprob=_finite(logprob),
                )
                for other, logprob in token.top
            ],
        )
        for token in tokens
    ]


def text_logprobs(tokens: Sequence[Token], spelling: Spelling, offset: int) -> Logprobs:
    """Parallel lists, as in completions.

    Args:
        offset: of the first token, in characters of the choice's text.
    """
    found = Logprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    # The API has lists that are joined by their positions.
    lists = found.text_offset, found.token_logprobs, found.tokens, found.top_logprobs
    offsets, logprobs, texts, tops = lists
    assert offsets is not None and logprobs is not None
    assert texts is not None and tops is not None
    for token in tokens:
        text = spelling.text_of(token.id)
        offsets.append(offset)
        logprobs.append(_finite(token.logprob))
        texts.append(text)
        tops.append({spelling.text_of(other): _finite(value) for other, value in token.top})
        offset += len(text)
    return found


def usage_of(prompt: int, completion: int, cached: int) -> CompletionUsage:
    """How many tokens there were; cached ones are among the prompt's."""
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(LEAST, logprob)
