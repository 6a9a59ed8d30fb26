"""`/set`: flags for answers that can be changed while talking, read as on the command line."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

import torch

from hybrimoe_plugin.cli.chat import flags
from hybrimoe_plugin.cli.chat.options import check_length, options_of
from hybrimoe_plugin.cli.chat.typed.session import Session
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import Parser
from hybrimoe_plugin.config import COLDEST_TEMPERATURE
from hybrimoe_plugin.errors import ConfigError, did_you_mean

_FILTERS = ("temperature", "top_p", "top_k", "min_p")
SETTABLE = (
    *_FILTERS,
    *("repetition_penalty", "greedy", "do_sample", "seed"),
    *("max_new_tokens", "stop", "force_think"),
)
DEFAULT = "default"
"""The value that takes a change back."""
_STOP_ESCAPE = re.compile(r"\\[nt\\]")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def current(session: Session, name: str) -> str:
    """The value of a setting, in words."""
    value = getattr(session.args, name)
    if value is None:
        return "none" if name in ("seed", "stop") else "as the model's generation config says"
    return ", ".join(map(repr, value)) if isinstance(value, list) else str(value)


def changed(session: Session, name: str, text: str) -> None:
    """Give a setting another value. Mutates: the session.

    Raises:
        ConfigError: there is no such setting, or the value is none of its. Nothing has changed
            then.
    """
    name = name.removeprefix("--").replace("-", "_")
    if name not in SETTABLE:
        known = ", ".join(SETTABLE)
        raise ConfigError(
            f"/set: there is no setting {name}{did_you_mean(name, SETTABLE)} (there are {known})"
        )
    values = argparse.Namespace(**vars(session.args))
    if name == "stop":
        text = _STOP_ESCAPE.sub(lambda found: _ESCAPES[found[0]], unquoted(text))
    _read(name, text, values)
    undone = _undo(name, values)
    options = options_of(values, session.chat.options.chunk_prefill_size)
    check_length(options.max_new_tokens, session.chat.context)
    if name == "seed" and values.seed is not None:
        torch.manual_seed(values.seed)
    session.args, session.chat.options = values, options
    notice("; ".join(f"{each}: {current(session, each)}" for each in (name, *undone)))


def unquoted(text: str) -> str:
    """A typed text without the quotes around it; quotes within it are its own."""
    inner = text[1:-1]
    return inner if text == f'"{inner}"' and '"' not in inner else text


def _undo(name: str, values: argparse.Namespace) -> list[str]:
    """Take back what contradicts a choice of tokens: what was asked for last counts.

    Returns:
        the names of the settings that changed. Mutates: `values`.
    """
    if name not in (*_FILTERS, "greedy", "do_sample") or getattr(values, name) is None:
        return []
    undone = []
    if name != "greedy" and values.greedy:
        values.greedy = False
        undone.append("greedy")
    if name != "do_sample" and values.do_sample is not None:
        values.do_sample = None
        undone.append("do_sample")
    cold = values.temperature is not None and values.temperature < COLDEST_TEMPERATURE
    if name != "temperature" and cold:
        values.temperature = None
        undone.append("temperature")
    return undone


def _read(name: str, text: str, values: argparse.Namespace) -> None:
    """Read one flag, its default for `default`. Mutates: `values`."""

    class Reader(Parser):
        def error(self, message: str) -> NoReturn:
            reason = message.removeprefix(f"argument --{name}: ")
            raise ConfigError(f"/set {name}: {reason}")

    reader = Reader(prog="/set", add_help=False, allow_abbrev=False)
    flags.add_answers(reader.add_argument_group())
    setattr(values, name, getattr(reader.parse_args([]), name))  # or a list would grow
    is_default = not text if name == "stop" else text == DEFAULT
    if not is_default:
        reader.parse_args([f"--{name}={text}"], values)
