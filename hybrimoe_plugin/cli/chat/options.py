"""How a chat makes its answers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe_plugin.cli.chat import flags
from hybrimoe_plugin.errors import ConfigError


@dataclass(frozen=True)
class ChatOptions:
    """How answers are made.

    Attributes:
        max_new_tokens: limit of tokens in an answer.
        sampling: changes of the model's generation config, such as `do_sample` and `temperature`.
        force_think: begin every answer with `<think>`.
        chunk_prefill_size: prompts of more tokens are computed in pieces of this size.
        sampler: `auto` lets flashinfer filter tokens where it is faster; `transformers` never does.
        stops: strings that end an answer; they are no part of it.
        quiet: print answers and errors alone.
    """

    max_new_tokens: int = 300
    sampling: Mapping[str, Any] | None = None
    force_think: bool = False
    chunk_prefill_size: int | None = None
    sampler: str = "auto"
    stops: Sequence[str] = ()
    quiet: bool = False


def check_length(max_new_tokens: int, context: int | None) -> None:
    """Refuse answers that leave no room for a prompt.

    Args:
        context: tokens that the model can take; None where that is not known.

    Raises:
        ConfigError: it names both.
    """
    if context is not None and max_new_tokens >= context:
        raise ConfigError(
            f"answers may have {max_new_tokens} tokens, and the model's context has {context} for "
            "message and answer: give a smaller --max_new_tokens"
        )


def options_of(args: argparse.Namespace, piece: int | None) -> ChatOptions:
    """What the flags say about answers.

    Args:
        args: with the flags of `flags.add_answers`.
        piece: longer prompts are computed in pieces of so many tokens.

    Raises:
        ConfigError: flags that contradict each other.
    """
    return ChatOptions(
        max_new_tokens=args.max_new_tokens,
        sampling=flags.sampling(args),
        force_think=args.force_think,
        chunk_prefill_size=piece,
        sampler=args.sampler,
        stops=tuple(args.stop or ()),
        quiet=args.quiet,
    )
