"""The loop of a conversation: read a message or a command, do it, until somebody leaves."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from hybrimoe_plugin.cli.chat.typed.commands import found, message_in, pieces
from hybrimoe_plugin.cli.chat.typed.session import Session
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.main import INTERRUPTED
from hybrimoe_plugin.cli.reading import is_file, read_message, read_prompt_file
from hybrimoe_plugin.errors import HybriMoEError

log = logging.getLogger(__name__)

_LEAVING = ("exit", "quit")
"""What people type who want to leave, and not to talk."""


def converse(session: Session, read: Callable[[str], str], is_editor: bool = False) -> int:
    """Talk until /exit or the end of the input.

    Args:
        read: shows a prompt and reads a line.
        is_editor: whether `read` handles Ctrl-C itself and raises KeyboardInterrupt, which then
            leaves only if it comes twice in a row. Without an editor Ctrl-C leaves.

    Returns:
        the exit code: 0, or 130 after Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C, without an editor.
    """
    interrupts = session.chat.interrupts
    interrupted = False
    with interrupts.handled():
        while not session.leaving:
            try:
                if is_editor:
                    content = read_message(read)
                else:
                    with interrupts.raising():
                        content = read_message(read)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not is_editor:
                    raise
                if interrupted:
                    return INTERRUPTED
                interrupted = True
                notice("the conversation goes on; Ctrl-C again or Ctrl-D leaves")
                continue
            interrupted = False
            for piece in pieces(content):
                if not session.leaving:
                    _take(session, piece)
    return 0


def _take(session: Session, content: str) -> None:
    """One message; whatever goes wrong, the conversation goes on."""
    try:
        _turn(session, content)
    except HybriMoEError as error:
        notice(f"error: {error}")
        log.info("in detail", exc_info=error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        notice("stopped")


def _turn(session: Session, content: str) -> None:
    if not content.strip():
        if session.prompt_file is None:
            notice("type a message; /help lists the commands, /exit leaves")
            return
        # An empty line sends the prompt file, as in kTransformers.
        session.chat.answer(read_prompt_file(session.prompt_file))
        return
    command = found(content)
    if command is not None:
        chosen, argument = command
        chosen.run(session, argument)
    elif is_file(content):
        text = read_prompt_file(content.strip())
        if not session.chat.options.quiet:
            notice(f"sending the text of {content.strip()}: {len(text)} characters")
        session.chat.answer(text)
    elif content.strip() in _LEAVING:
        notice(f"{content.strip()!r} was not sent: /exit or Ctrl-D leaves")
    else:
        session.chat.answer(message_in(content))
