"""Answers of completions, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from openai.types import Completion
from openai.types.completion_choice import CompletionChoice
from openai.types.completion_usage import CompletionUsage

from hybrimoe_plugin.serve.api.openai_completions.told import text_logprobs
from hybrimoe_plugin.serve.requests import Reason, Token
from hybrimoe_plugin.serve.text.asking import Answer, Delta
from hybrimoe_plugin.serve.text.parts import Content
from hybrimoe_plugin.serve.text.spelling import Spelling


class TextAnswers:
    """Writes the answers to one request.

    Args:
        before: the text that each choice begins with: its prompt, where that is asked for.
        spelling: to tell log-probabilities; None where they are not asked for.
    """

    def __init__(
        self, id: str, model: str, before: Sequence[str], spelling: Spelling | None
    ) -> None:
        self._id = id
        self._model = model
        self._created = int(time.time())
        self._before = before
        self._spelling = spelling
        self._offsets = [len(text) for text in before]
        """Of each choice's next token."""

    def whole(self, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        """The JSON of the complete answer."""
        choices = [
            self._choice(index, before + answer.content, answer.tokens, answer.reason)
            for index, (before, answer) in enumerate(zip(self._before, answers, strict=True))
        ]
        return self._json(choices, usage)

    def first(self, choice: int) -> str | None:
        """The JSON of a choice's first chunk; None where nothing precedes the answer."""
        before = self._before[choice]
        return self._json([self._choice(choice, before, [], None)]) if before else None

    def more(self, delta: Delta) -> str | None:
        """The JSON of what is new; None where there is nothing to tell."""
        text = "".join(part.text for part in delta.parts if isinstance(part, Content))
        has_logprobs = self._spelling is not None and delta.tokens
        if not text and not has_logprobs and delta.end is None:
            return None
        reason = None if delta.end is None else delta.end.reason
        return self._json([self._choice(delta.index, text, delta.tokens, reason)])

    def usage(self, usage: CompletionUsage) -> str:
        """The JSON of the chunk that tells the number of tokens."""
        return self._json([], usage)

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], reason: Reason | None
    ) -> CompletionChoice:
        logprobs = None
        if self._spelling is not None:
            logprobs = text_logprobs(tokens, self._spelling, self._offsets[index])
            self._offsets[index] += sum(map(len, logprobs.tokens or ()))
        # OpenAI's class demands a reason even of chunks that have none.
        return CompletionChoice.model_construct(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=None if reason is None else _reason(reason),
        )

    def _json(self, choices: list[CompletionChoice], usage: CompletionUsage | None = None) -> str:
        told: dict[str, Any] = {} if usage is None else {"usage": usage}
        found = Completion.model_construct(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **told,
        )
        return found.model_dump_json(exclude_unset=True)


def _reason(reason: Reason) -> str:
    return "length" if reason is Reason.LENGTH else "stop"
