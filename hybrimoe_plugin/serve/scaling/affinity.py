"""Which conversation a request belongs to, and which replica keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

FIRST_CHARACTERS = 256
"""Of a prompt without messages: later turns of the same text begin with these as well."""
FIRST_TOKENS = 64
"""Likewise, of a prompt that is given as token ids."""


def conversation_key(body: bytes, session: str | None = None) -> str | None:
    """A key that all turns of one conversation have in common.

    The first of these that is there: the session; the field `prompt_cache_key`; the system prompt
    with the messages up to the first of the user; the first characters or tokens of a prompt. Text
    counts and not the form it is given in, since clients change that from turn to turn.

    Args:
        body: JSON of any of the APIs, or anything else.
        session: the client's own name of the conversation.

    Returns:
        32 hexadecimal digits; None for a request without a conversation.
    """
    if session:
        return _digest("session", session)
    try:
        fields = json.loads(body)
        return _key_of(fields) if isinstance(fields, dict) else None
    except (ValueError, RecursionError):  # the replica refuses it
        return None


def ranked(key: str, replicas: Iterable[str]) -> list[str]:
    """Replicas in the order in which they are asked: rendezvous hashing.

    The order of any two replicas depends on the key and on these two alone. So a replica that
    leaves gives up no keys but its own, and one that joins takes an equal part from each.
    """
    return sorted(replicas, key=lambda replica: _digest(key, replica))


def _key_of(fields: Mapping[str, Any]) -> str | None:
    named = fields.get("prompt_cache_key")
    if isinstance(named, str) and named:
        return _digest("session", named)
    beginning = _beginning(fields)
    return None if beginning is None else _digest("beginning", *beginning)


def _beginning(fields: Mapping[str, Any]) -> list[str] | None:
    """What no later turn changes; None where there is nothing of the kind."""
    for name in ("messages", "input"):
        if name in fields:
            system = fields.get("system") or fields.get("instructions")
            return [_text(system), *_first_messages(fields[name])]
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # several prompts at once stay together
    if isinstance(prompt, str) and prompt:
        return [prompt[:FIRST_CHARACTERS]]
    if isinstance(prompt, list) and prompt:
        return [_text(prompt[:FIRST_TOKENS])]
    return None


def _first_messages(messages: Any) -> list[str]:
    """Roles and texts, up to the user's first message."""
    if isinstance(messages, str):
        return ["user", messages]
    told = []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            continue
        role = message.get("role")
        told += [_text(role), _text(message.get("content"))]
        if role == "user":
            break
    return told


def _text(content: Any) -> str:
    """Text, the texts of its parts, or JSON of what is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    return json.dumps(content, sort_keys=True)


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        return _text(part) + " "
    if isinstance(part.get("text"), str):
        return str(part["text"])
    # Anthropic's clients move this mark to the newest message at every turn.
    return json.dumps({name: part[name] for name in part if name != "cache_control"})


def _digest(*texts: str) -> str:
    digest = blake2b(digest_size=16)
    for text in texts:
        coded = text.encode("utf-8", "surrogatepass")
        digest.update(len(coded).to_bytes(8, "little"))  # so that ("ab", "c") is not ("a", "bc")
        digest.update(coded)
    return digest.hexdigest()
