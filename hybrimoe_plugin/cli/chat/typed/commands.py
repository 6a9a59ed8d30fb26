"""The commands of a conversation. `/help` and completion come from the table."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hybrimoe_plugin.cli.chat.typed import saved
from hybrimoe_plugin.cli.chat.typed.session import Session
from hybrimoe_plugin.cli.chat.typed.settable import SETTABLE, changed, current, unquoted
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.reading import is_file, well_formed
from hybrimoe_plugin.errors import ConfigError, did_you_mean

_COMMAND = re.compile(r"/(/?)([A-Za-z]+|\?)(?:\s+(.*))?", re.DOTALL)
"""A first word of a slash and letters. `/home/x` and `/2` are none."""

_ELSEWHERE = {"?": "help", "bye": "exit", "regenerate": "retry"}
"""Names that other chats have for the same -> ours."""

NOTES = (
    "//text sends /text. A message that is only the name of a file sends the file's text.",
    'Several lines: paste them, press Alt+Enter between them, or put """ before and after.',
)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        argument: what follows the name, as `/help` shows it; "" for nothing.
        run: does it, with the text behind the name.
    """

    name: str
    argument: str
    help: str
    run: Callable[[Session, str], None]


def pieces(text: str) -> list[str]:
    """A typed message as commands, a line each, and the message that is left behind them.

    Lines that are typed while the model answers arrive as one text. Only `/system` takes several.
    """
    ours = {command.name for command in COMMANDS if command.name != "system"} | {*_ELSEWHERE}
    commands: list[str] = []
    rest = text
    while True:
        line, _, behind = rest.lstrip().partition("\n")
        match = _COMMAND.fullmatch(line.strip())
        if match is None or match[1] or match[2] not in ours or not behind.strip():
            return [*commands, rest]
        commands.append(line)
        rest = behind


def found(text: str) -> tuple[Command, str] | None:
    """The command and its argument in a typed message; None for a message to the model.

    Raises:
        ConfigError: it looks like a command, and there is none of that name, or it takes no text.
    """
    match = _COMMAND.fullmatch(text.strip())
    if match is None or match[1]:
        return None
    name, argument = _ELSEWHERE.get(match[2], match[2]), (match[3] or "").strip()
    for command in COMMANDS:
        if command.name == name:
            if argument and not command.argument:
                raise ConfigError(
                    f"/{name} takes nothing behind it, found {argument[:40]!r} (//{name} ... sends "
                    "it as text)"
                )
            return command, argument
    if is_file(text):
        return None
    known = [f"/{command.name}" for command in COMMANDS]
    raise ConfigError(
        f"there is no command /{name}{did_you_mean(f'/{name}', known)} (/help lists them; "
        f"//{name} sends it as text)"
    )


def message_in(text: str) -> str:
    """What a typed message that is no command sends."""
    match = _COMMAND.fullmatch(text.strip())
    return text.strip()[1:] if match is not None and match[1] else text


def _help(_session: Session, _argument: str) -> None:
    names = [f"/{command.name} {command.argument}".strip() for command in COMMANDS]
    width = max(map(len, names))
    lines = [
        f"  {name:{width}}  {command.help}" for name, command in zip(names, COMMANDS, strict=True)
    ]
    _print(*lines, *NOTES)


def _system(session: Session, argument: str) -> None:
    chat = session.chat
    if argument:
        chat.system = well_formed(unquoted(argument)).strip()
    notice(f"system prompt: {chat.system}" if chat.system else "there is no system prompt")


def _set(session: Session, argument: str) -> None:
    if not argument:
        _print(*(f"  {name} {current(session, name)}" for name in SETTABLE))
        return
    name, _, value = argument.partition(" ")
    if not value.strip() and name in SETTABLE and name != "stop":
        notice(f"{name}: {current(session, name)}")
        return
    changed(session, name, value.strip())


def _save(session: Session, argument: str) -> None:
    path = _path("save", argument)
    saved.save(path, session.chat.system, session.chat.messages)
    notice(f"saved as {path}")


def _load(session: Session, argument: str) -> None:
    path = _path("load", argument)
    system, messages = saved.load(path)
    before = session.chat.system
    session.chat.replace(system, messages)
    if system == before:
        change = ""
    elif system:
        change = ", with their system prompt"
    else:
        change = "; they have no system prompt, so there is none now"
    notice(f"{len(messages) // 2} turn(s) of {path} are the conversation now{change}")


def _stats(session: Session, _argument: str) -> None:
    chat = session.chat
    lines = [] if chat.timing is None else chat.timing.lines()
    room = "" if chat.context is None else f" of {chat.context}"
    if chat.timing is not None:
        used = f"{chat.timing.context_tokens}{room} token(s)"
    elif chat.messages or chat.system:
        used = f"not known before the next answer{room and f';{room} token(s)'}"
    else:
        used = f"0{room} token(s)"
    _print(*lines, f"context:              {used}", *session.facts())


def _clear(session: Session, _argument: str) -> None:
    session.chat.clear()


def _retry(session: Session, _argument: str) -> None:
    session.chat.retry()


def _exit(session: Session, _argument: str) -> None:
    session.leaving = True


def _path(command: str, text: str) -> Path:
    if not text:
        raise ConfigError(f"/{command}: name a file")
    try:
        return Path(well_formed(text)).expanduser()
    except RuntimeError as error:  # a user without a home
        raise ConfigError(f"/{command}: {error}") from error


def _print(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)


COMMANDS = (
    Command("help", "", "show this", _help),
    Command("system", "[TEXT]", 'show the system prompt or set it; "" removes it', _system),
    Command("set", "[NAME VALUE]", "show how answers are made, or change it", _set),
    Command("retry", "", "answer the last message again", _retry),
    Command("clear", "", "forget the conversation", _clear),
    Command("save", "FILE", "write the conversation to a file, as JSON", _save),
    Command("load", "FILE", "go on with a saved conversation", _load),
    Command("stats", "", "show counts, times and the context used", _stats),
    Command("exit", "", "leave, as Ctrl-D does", _exit),
    Command("quit", "", "the same", _exit),
)
