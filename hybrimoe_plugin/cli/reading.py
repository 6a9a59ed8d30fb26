'''What the user types: one line, several between """, the name of a file, or a command.'''

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.files import read_regular

FENCE = '"""'
MAX_FILE_BYTES = 16 * 2**20


def read_message(read: Callable[[str], str], prompt: str = "Chat: ") -> str:
    """Read one message; `read` is `input` or behaves like it.

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
    """The text that was typed, where the terminal's encoding does not say what its bytes mean.

    Python keeps bytes that it cannot decode as lone surrogates. Where they are UTF-8 after all (in
    the C locale), that is what is meant.

    Raises:
        ConfigError: they are not.
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
        ConfigError: it cannot be read, is not UTF-8 text, is empty or far too large.
    """
    try:
        # Editors on Windows begin files with a byte order mark, and end lines in two characters.
        text = read_regular(path, MAX_FILE_BYTES).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the prompt file: {error.strerror or error}"
        ) from error
    except UnicodeError as error:
        raise ConfigError(f"{path}: cannot read the prompt file: not UTF-8 text") from error
    if not text.strip():
        raise ConfigError(f"{path}: the prompt file is empty")
    return text


def is_file(text: str) -> bool:
    """Whether a typed line names a file, as `ktransformers.local_chat` takes it."""
    try:
        return bool(text.strip()) and "\n" not in text and Path(text.strip()).is_file()
    except (OSError, ValueError):
        return False
