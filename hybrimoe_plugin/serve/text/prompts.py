"""From messages or texts to the token ids of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers.chat.encode import embedding_rows, encode
from hybrimoe_plugin.hosts.transformers.chat.template import ChatTemplate
from hybrimoe_plugin.serve.requests import PromptError

RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
)
"""Variables of a template that have fields of their own."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: each with `role` and `content`, a text, as templates read them: arguments of tool
            calls are objects, the reasoning of earlier answers is `reasoning_content`.
        tools: as OpenAI writes them; None for none.
        variables: more that the template may ask for, such as `enable_thinking`.
        continue_last: whether the answer continues the last message.
        generation_prompt: whether the text ends with the beginning of the next answer.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None
    continue_last: bool = False
    generation_prompt: bool = True


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Attributes:
        text: None where the client gave token ids.
        ids: at least one.
    """

    text: str | None
    ids: tuple[int, ...]


class Prompts:
    """Renders and encodes for one model.

    Templates are rendered in a process of their own and texts may be long, so that all of it
    happens outside the event loop.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)

    @property
    def template(self) -> str:
        """The source of the chat template; "" without one."""
        return self._template.source

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model has; None where it does not say."""
        return embedding_rows(self._model)

    async def chat(self, conversation: Conversation) -> Prompt:
        """The prompt of a conversation.

        Raises:
            PromptError: template or tokenizer refuse it, in their own words.
        """
        return await anyio.to_thread.run_sync(self._chat, conversation)

    async def text(self, text: str, add_special_tokens: bool = True) -> Prompt:
        """The prompt that is this text. Raises: PromptError: as of `chat`."""
        return await anyio.to_thread.run_sync(self._encode, text, add_special_tokens)

    def ids(self, ids: Sequence[int]) -> Prompt:
        """The prompt of these tokens. Raises: PromptError: the model does not have them all."""
        if not ids:
            raise PromptError("the prompt has no tokens")
        rows = self.vocabulary
        if min(ids) < 0 or (rows is not None and max(ids) >= rows):
            raise PromptError(f"the prompt holds tokens that the model's {rows} do not include")
        return Prompt(None, tuple(ids))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def close(self) -> None:
        """End the template's process."""
        self._template.close()

    def _chat(self, conversation: Conversation) -> Prompt:
        if not self._template.exists:
            return self._encode("\n".join(one["content"] for one in conversation.messages), True)
        reserved = RESERVED.intersection(conversation.variables or ())
        if reserved:
            raise PromptError(f"a template's variables cannot be named {', '.join(reserved)}")
        try:
            text = self._template.render(
                conversation.messages,
                conversation.tools,
                conversation.variables,
                conversation.generation_prompt,
                conversation.continue_last,
            )
        except (ConfigError, RecursionError) as error:
            raise PromptError(str(error)) from error
        return self._encode(text, False)

    def _encode(self, text: str, add_special_tokens: bool) -> Prompt:
        try:
            ids = encode(self._model, self._tokenizer, text, add_special_tokens)
        except ConfigError as error:
            raise PromptError(str(error)) from error
        return Prompt(text, tuple(ids[0].tolist()))
