"""Text and bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import re
from typing import Any

_BROKEN = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "▁"
"""SentencePiece's sign."""


class Spelling:
    """Remembers what it has looked up: the same few tokens are told again and again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._byte_of = {char: byte for byte, char in _byte_level().items()}

    def bytes_of(self, token: int) -> bytes:
        """UTF-8, of which a single token may hold a part of a character."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def text_of(self, token: int) -> str:
        """Broken characters are replaced."""
        return self.bytes_of(token).decode("utf-8", errors="replace")

    def _look_up(self, token: int) -> bytes:
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        convert = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        raw = convert(token) if convert is not None else None
        if not isinstance(raw, str):
            return text.encode("utf-8", errors="replace")
        byte = _BYTE.fullmatch(raw)
        if byte:
            return bytes([int(byte[1], 16)])
        if _BROKEN in text and all(char in self._byte_of for char in raw):
            return bytes(self._byte_of[char] for char in raw)
        if raw.startswith(_BLANK):  # decoders leave the first blank of a text out
            text = " " + text.removeprefix(" ")
        return text.encode("utf-8", errors="replace")


def _byte_level() -> dict[int, str]:
    """The character by which byte-level BPE writes each byte: printable ones are themselves."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    found = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        if byte not in found:
            found[byte] = chr(256 + len(found) - len(kept))
    return found
