'''What the user types: one line, several between """, the name of a file, or a command.'''

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybrimoe_plugin.errors import ConfigError

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


def read_prompt_file(path: str | Path) -> str:
    """The text of a prompt file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 text, is empty or far too large.
    """
    try:
        file = Path(path)
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; this is not a prompt")
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the prompt file: {reason}") from error
    if not text.strip():
        raise ConfigError(f"{path}: the prompt file is empty")
    return text


def is_file(text: str) -> bool:
    """Whether a typed line names a file, as `ktransformers.local_chat` takes it."""
    try:
        return bool(text.strip()) and "\n" not in text and Path(text.strip()).is_file()
    except (OSError, ValueError):
        return False
