"""A conversation whose model says what it is told to."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import torch

from hybrimoe_plugin.cli.chat.conversation import Chat, ChatOptions

END = 0


class Tokenizer:
    """One token per character."""

    chat_template: str | None = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
    )

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            input_ids=torch.tensor([[ord(char) for char in text]], dtype=torch.int64).reshape(1, -1)
        )

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i)) for i in ([ids] if isinstance(ids, int) else ids) if i != END)


class Model:
    """Says what it is told to, token by token, as `generate` would."""

    def __init__(self, *answers: str, context: int = 1000) -> None:
        self.answers = list(answers)
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.generation_config = SimpleNamespace(
            eos_token_id=[END], pad_token_id=None, max_length=20
        )
        self.device = torch.device("cpu")
        self.prompts: list[str] = []
        self.configs: list[Any] = []
        self.interrupt_after: int | None = None

    def generate(
        self,
        ids: torch.Tensor,
        *,
        streamer: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **_: Any,
    ) -> None:
        self.prompts.append("".join(chr(i) for i in ids[0].tolist()))
        self.configs.append(generation_config)
        streamer.put(ids)
        for count, token in enumerate([*map(ord, self.answers.pop(0)), END], start=1):
            streamer.put(torch.tensor([token]))
            if count == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            if bool(stopping_criteria(ids, None).all()):
                break
        streamer.end()


def chat(model: Model, report: Any = lambda: None, **options: Any) -> Chat:
    return Chat(model, Tokenizer(), ChatOptions(**options), report)
