"""From a conversation to the tokens of its next prompt."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch

from hybrimoe_plugin.cli.chat.options import ChatOptions
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers.chat.encode import encode
from hybrimoe_plugin.hosts.transformers.chat.template import ChatTemplate

THINK = "<think>\n"

Messages = list[dict[str, str]]
"""Questions and answers in turn, each with `role` and `content`."""


@dataclass(frozen=True)
class Prompt:
    """What the model is given for an answer.

    Attributes:
        ids: [1, T] int64.
        left_out: how many of the oldest turns the context has no room for.
        opening: the answer's beginning, where it is part of the prompt: `THINK`, or "".
    """

    ids: torch.Tensor
    left_out: int
    opening: str

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


class Prompts:
    """Renders and encodes conversations for one model.

    Args:
        model: whose context and embedding limit a prompt.
        tokenizer: with a chat template; without one, messages are joined as plain text.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)

    @property
    def context(self) -> int | None:
        """Tokens that the model can take; None where its config does not say."""
        return getattr(self._model.config, "max_position_embeddings", None)

    def fitting(self, system: str, messages: Messages, options: ChatOptions) -> Prompt:
        """The prompt of the messages, without the oldest turns that the context has no room for.

        Args:
            system: the system prompt, which is never left out; "" for none.
            messages: the last one is the question.

        Raises:
            ConfigError: the last message alone is too long, or template or tokenizer refuse it.
        """

        def without(turns: int) -> Prompt:
            return self._encode(system, messages, turns, options.force_think)

        def fits(prompt: Prompt) -> bool:
            return self.context is None or prompt.tokens + options.max_new_tokens <= self.context

        prompt, earlier = without(0), len(messages) // 2
        if earlier and not fits(prompt):
            # Halving: a long conversation is not rendered once for each of its turns.
            fewest = 1 + bisect_left(range(1, earlier), True, key=lambda n: fits(without(n)))
            prompt = without(fewest)
        if fits(prompt):
            return prompt
        raise ConfigError(
            f"the message has {prompt.tokens} tokens, the answer may have "
            f"{options.max_new_tokens}, the model's context has {self.context}: shorten "
            "the message or give a smaller --max_new_tokens"
        )

    def _encode(self, system: str, messages: Messages, left_out: int, force_think: bool) -> Prompt:
        """The prompt without so many of the oldest turns."""
        messages = messages[2 * left_out :]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        has_template = self._template.exists
        if has_template:
            text = self._template.render(messages)
        else:
            text = "\n".join(message["content"] for message in messages)
        # Templates of models that always think begin the answer themselves.
        opening = THINK if force_think and not text.rstrip().endswith(THINK.strip()) else ""
        ids = encode(self._model, self._tokenizer, text + opening, not has_template)
        return Prompt(ids, left_out, opening)
