"""A conversation that somebody types: the chat, and what commands change."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from hybrimoe_plugin.cli.chat.conversation import Chat


@dataclass
class Session:
    """What the commands of a conversation work on.

    Attributes:
        chat: the conversation.
        args: values of the flags for answers, which `/set` changes.
        facts: more lines for `/stats`.
        prompt_file: whose text an empty line sends; None for none.
        leaving: whether the conversation is to end.
    """

    chat: Chat
    args: argparse.Namespace
    facts: Callable[[], list[str]] = list
    prompt_file: str | None = None
    leaving: bool = False
