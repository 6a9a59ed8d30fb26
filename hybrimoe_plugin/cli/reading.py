'''Read what the user types: a line, several lines between """, a file name, or a command.'''

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.files import read_regular

FENCE = '"""'
MAX_FILE_BYTES = 16 * 2**20


def read_message(read: Callable[[str], str], prompt: str = "Chat: ") -> str:
    """Read one message.

    Args:
        read: `input`, or a function like it.
        prompt: printed before the first line.

    Raises:
        EOFError: the input has ended and nothing was typed.
    """
    line = read(prompt)
    if not line.startswith(FENCE):
        return line
    rest = line[len(FENCE) :]
    if rest.endswith(FENCE):
        return rest[: -len(FENCE)]
    lines = [rest] if rest else []
    while True:
        try:
            line = read("")
        except EOFError:
            break
        if line.endswith(FENCE):
            if line != FENCE:
                lines.append(line[: -len(FENCE)])
            break
        lines.append(line)
    return "\n".join(lines)


def well_formed(text: str) -> str:
    """The typed text, its undecodable bytes decoded as UTF-8.

    Python keeps bytes that it cannot decode as lone surrogates. In the C locale these may be UTF-8
    nevertheless.

    Raises:
        ConfigError: the bytes are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8").removeprefix("\ufeff")
    except UnicodeError as error:
        raise ConfigError(
            "the message is not UTF-8 text: set the terminal to UTF-8 and type it again"
        ) from error


def read_prompt_file(path: str | Path) -> str:
    """The text of a prompt file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 text, is empty, or is larger than
            `MAX_FILE_BYTES`.
    """
    try:
        raw = read_regular(path, MAX_FILE_BYTES)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path}: cannot read the prompt file: {reason}") from error
    except UnicodeError as error:
        raise ConfigError(f"{path}: cannot read the prompt file: not UTF-8 text") from error
    if not text.strip():
        raise ConfigError(f"{path}: the prompt file is empty")
    # Windows editors end lines with two characters (and begin files with a byte order mark).
    return text.replace("\r\n", "\n")


def is_file(text: str) -> bool:
    """Whether a typed line is the name of a file, whose text it then stands for."""
    name = text.strip()
    if not name or "\n" in text:
        return False
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False
