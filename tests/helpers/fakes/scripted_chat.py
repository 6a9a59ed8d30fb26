"""A conversation whose model says what it is told to."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from hybrimoe_plugin.cli.chat.conversation import Chat
from hybrimoe_plugin.cli.chat.flags import add_answers
from hybrimoe_plugin.cli.chat.options import ChatOptions, options_of
from hybrimoe_plugin.cli.chat.typed import loop
from hybrimoe_plugin.cli.chat.typed.session import Session

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
        self.delays_s: list[float] = []
        """Of the first answers, before each token. They are announced on stderr when they begin."""

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
        answer, delay_s = self.answers.pop(0), 0.0
        if self.delays_s:
            delay_s = self.delays_s.pop(0)
            print("computing", file=sys.stderr, flush=True)
        for count, token in enumerate([*map(ord, answer), END], start=1):
            _wait(delay_s)
            streamer.put(torch.tensor([token]))
            if count == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            if bool(stopping_criteria(ids, None).all()):
                break
        streamer.end()


def _wait(seconds: float) -> None:
    """In short steps: a signal that another thread takes does not wake the main thread up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def chat(model: Model, report: Any = lambda: None, **options: Any) -> Chat:
    return Chat(model, Tokenizer(), ChatOptions(**options), report)


def session(model: Model, *flags: str, prompt_file: str | None = None, **facts: Any) -> Session:
    """A conversation with the flags for answers."""
    parser = argparse.ArgumentParser()
    add_answers(parser.add_argument_group())
    args = parser.parse_args(["--quiet", *flags])
    talk = Chat(model, Tokenizer(), options_of(args, None))
    return Session(talk, args, prompt_file=prompt_file, **facts)


def converse(
    model: Model, *lines: str, prompt_file: str | None = None, flags: Sequence[str] = ()
) -> Session:
    """Type the lines, and then the end of the input."""
    typed = iter(lines)

    def read(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    made = session(model, *flags, prompt_file=prompt_file)
    assert loop.converse(made, read) == 0
    return made
