"""Reading messages at a terminal: editing, history, completion, and pasted text."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Iterable
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus, has_selection
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from hybrimoe_plugin.cache_folder import cache_dir
from hybrimoe_plugin.cli.chat.typed.commands import COMMANDS
from hybrimoe_plugin.cli.chat.typed.history import history
from hybrimoe_plugin.cli.chat.typed.settable import SETTABLE
from hybrimoe_plugin.cli.reading import FENCE

_GRACE_S = 0.01
"""Terminals send pasted text in parts; people do not type the next key this soon."""
_PAUSE_S = 0.2
"""The same within a long paste, which a busy machine may hand on with pauses."""
_LONG = 32
"""Characters that nobody types at once."""


def editor() -> Callable[[str], str]:
    """Reads one message: shows a prompt and returns the text; for a stdin that is a terminal.

    The returned function raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C.
    """
    output: Any = create_output(always_prefer_tty=True)
    # The terminal's answers to questions about the cursor would be taken for typed text while the
    # model answers. They are needed for menus only.
    output.enable_cpr = False
    session: PromptSession[str] = PromptSession(
        history=history(cache_dir()),
        completer=Commands(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=bindings(),
        multiline=True,
        prompt_continuation="",
        output=output,
    )

    def read(prompt: str) -> str:
        return _unfenced(session.prompt(prompt))

    return read


class Commands(Completer):
    """Completes commands, the settings of `/set`, and file names."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        name, space, rest = typed.partition(" ")
        if not name.startswith("/") or "\n" in typed:
            return
        if not space:
            yield from _matching((f"/{command.name}" for command in COMMANDS), name)
        elif name == "/set":
            yield from _matching(SETTABLE, rest)
        elif name in ("/save", "/load"):
            files = PathCompleter(expanduser=True)
            yield from files.get_completions(Document(rest), event)


def _matching(words: Iterable[str], typed: str) -> Iterable[Completion]:
    for word in words:
        if word.startswith(typed):
            yield Completion(word, start_position=-len(typed))


def bindings() -> KeyBindings:
    """Enter sends; Alt+Enter begins a new line, and so does Enter within a paste."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching in the history

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if _is_open(buffer.text) or _has_more(event):
            _new_line(buffer)
            buffer.insert_text(_waiting_text(event))
        else:
            buffer.validate_and_handle()

    @keys.add(Keys.Any, filter=typing & ~has_selection, save_before=lambda e: not e.is_repeat)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text(event.data * event.arg + _waiting_text(event))

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        _new_line(event.current_buffer)

    return keys


def _has_more(event: KeyPressEvent) -> bool:
    """Whether more input is there already when Enter arrives.

    Terminals that bracket pasted text say where it ends, and no Enter in it gets here. Others send
    it as if it was typed, line by line but at once: then what follows an Enter is waiting in the
    queue of keys, or in the terminal if the text is longer than one read. Such an Enter belongs to
    the message, which would else be cut into one message a line. The last Enter has nothing behind
    it. Lines that were typed while the model answered are joined in the same way.
    """
    waiting = event.key_processor.input_queue
    return any(press.key != Keys.CPRResponse for press in waiting) or _is_ready(event, _GRACE_S)


def _is_ready(event: KeyPressEvent, seconds: float) -> bool:
    """Whether the terminal has more input, or has some within the time."""
    try:
        ready, _, _ = select.select([event.app.input.fileno()], [], [], seconds)
    except (OSError, ValueError, NotImplementedError):  # an input without a file
        return False
    return bool(ready)


def _waiting_text(event: KeyPressEvent) -> str:
    """Take the text that comes right behind a key out of the queue and the terminal.

    A paste that comes as if it was typed has tens of thousands of keys. The editor takes half a
    millisecond for each, and draws the whole message again and again. An Enter with nothing behind
    it stays in the queue: it may send the message.
    """
    queue = event.key_processor.input_queue
    text: list[str] = []

    def has_more() -> bool:
        grace_s = _GRACE_S if text else 0.0
        return _is_ready(event, _PAUSE_S if len(text) >= _LONG else grace_s)

    while queue or has_more():
        if not queue:
            queue.extend(event.app.input.read_keys())
            if not queue:  # the end, or a part of a key
                break
        press = queue[0]
        if press.key == Keys.Enter and (len(queue) > 1 or has_more()):
            text.append("\n")
        elif not isinstance(press.key, Keys) and press.key == press.data:
            text.append(press.data)
        else:
            break
        queue.popleft()
    return "".join(text)


def _new_line(buffer: Buffer) -> None:
    buffer.newline(copy_margin=False)


def _is_open(text: str) -> bool:
    """Whether a message has begun with the fence and not ended with it."""
    text = text.strip()
    return text.startswith(FENCE) and (len(text) < 2 * len(FENCE) or not text.endswith(FENCE))


def _unfenced(text: str) -> str:
    """The message, where it has fences without their own lines."""
    stripped = text.strip()
    if not stripped.startswith(FENCE) or _is_open(text):
        return text
    inner = stripped[len(FENCE) : -len(FENCE)]
    return f"{FENCE}{inner.removeprefix(chr(10)).removesuffix(chr(10))}{FENCE}"


def is_terminal() -> bool:
    """Whether somebody types and sees what is typed."""
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    outputs = (sys.stdout, sys.stderr)
    return any(output is not None and output.isatty() for output in outputs)
