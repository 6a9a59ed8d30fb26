"""Conversations in files: JSON with the list of messages that chat templates take."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cache_folder import write_atomic
from hybrimoe_plugin.cli.chat.prompt import Messages
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.files import read_regular

MAX_BYTES = 16 * 2**20
"""Of JSON, which may take 25 times as much while it is read."""
_TURNS = ("user", "assistant")


def save(path: Path, system: str, messages: Messages) -> None:
    """Write a conversation; the file is complete, or what it was.

    A file that is replaced keeps its permissions, and a symbolic link stays one.

    Raises:
        ConfigError: it cannot be written, or holds something other than a conversation.
    """
    if os.path.lexists(path):
        _check_replaceable(path)
    if not path.parent.is_dir():
        raise ConfigError(f"/save: {path.parent}: no such directory")
    first = [{"role": "system", "content": system}] if system else []
    text = json.dumps({"messages": first + messages}, ensure_ascii=False, indent=1)
    try:
        write_atomic(Path(os.path.realpath(path)), text + "\n")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ConfigError(f"/save: {path}: {_reason(error)}") from error


def _check_replaceable(path: Path) -> None:
    """Refuse to replace a file with which more than a saved conversation would be lost.

    Raises:
        ConfigError: it holds anything else, such as what another program adds to conversations.
    """
    try:
        found = _read(path)
        _conversation(path, found)
        parts = [found, *found["messages"]]
        names = [{"messages"}, *({"role", "content"} for _ in found["messages"])]
        if any(set(part) != known for part, known in zip(parts, names, strict=True)):
            raise ConfigError("it holds more than a conversation")
    except ConfigError as error:
        raise ConfigError(
            f"/save: {path} exists and is not replaced, as it is no saved conversation: choose "
            "another name"
        ) from error


def load(path: Path) -> tuple[str, Messages]:
    """(system prompt or "", messages) of a saved conversation.

    Raises:
        ConfigError: it cannot be read, or is no conversation.
    """
    return _conversation(path, _read(path))


def _read(path: Path) -> Any:
    try:
        return json.loads(read_regular(path, MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"/load: {path}: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        kind = type(error).__name__
        raise ConfigError(f"/load: {path} cannot be read as JSON ({kind}: {error})") from error


def _conversation(path: Path, found: Any) -> tuple[str, Messages]:
    """(system prompt or "", messages) in what a file holds."""
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list):
        raise ConfigError(
            f'/load: {path} is no saved conversation: expected an object with "messages"'
        )
    roles = [_role(path, place, message) for place, message in enumerate(messages)]
    has_system = roles[:1] == ["system"]
    turns = roles[1:] if has_system else roles
    if len(turns) % 2 or any(role != _TURNS[place % 2] for place, role in enumerate(turns)):
        raise ConfigError(
            f"/load: {path}: expected messages of user and assistant in turn, found "
            f"{', '.join(roles[:6])}{', ...' if len(roles) > 6 else ''}"
        )
    texts = [{"role": message["role"], "content": message["content"]} for message in messages]
    return (texts[0]["content"], texts[1:]) if has_system else ("", texts)


def _role(path: Path, place: int, message: Any) -> str:
    """The role of a message that is one: `role` and `content` are text."""
    parts = message if isinstance(message, dict) else {}
    role, content = parts.get("role"), parts.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(f"/load: {path}: message {place + 1} has no role and content as text")
    try:
        content.encode()
    except UnicodeError as error:
        raise ConfigError(f"/load: {path}: message {place + 1} is no Unicode text") from error
    return role[:20]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
