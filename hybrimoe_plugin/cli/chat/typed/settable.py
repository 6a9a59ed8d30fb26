"""`/set`: flags for answers that can be changed while talking, read as on the command line."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch

from hybrimoe_plugin.cli.chat import flags
from hybrimoe_plugin.cli.chat.options import options_of
from hybrimoe_plugin.cli.chat.typed.session import Session
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import Parser
from hybrimoe_plugin.errors import ConfigError, did_you_mean

_FILTERS = ("temperature", "top_p", "top_k", "min_p")
SETTABLE = (
    *_FILTERS,
    *("repetition_penalty", "greedy", "do_sample", "seed"),
    *("max_new_tokens", "stop", "force_think"),
)


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
    setattr(values, name, None)  # or a list would grow
    if text or name != "stop":  # no text: no stop string
        _read(name, text, values)
    # What was asked for last counts.
    if name in _FILTERS or (name == "do_sample" and values.do_sample):
        values.greedy = False
    if name in _FILTERS or (name == "greedy" and values.greedy):
        values.do_sample = None
    options = options_of(values, session.chat.options.chunk_prefill_size)
    if name == "seed":
        torch.manual_seed(values.seed)
    session.args, session.chat.options = values, options
    notice(f"{name}: {current(session, name)}")


def _read(name: str, text: str, values: argparse.Namespace) -> None:
    """Read one flag. Mutates: `values`."""

    class Reader(Parser):
        def error(self, message: str) -> NoReturn:
            reason = message.removeprefix(f"argument --{name}: ")
            raise ConfigError(f"/set {name}: {reason}")

    reader = Reader(prog="/set", add_help=False, allow_abbrev=False)
    flags.add_answers(reader.add_argument_group())
    reader.parse_args([f"--{name}={text}"], values)
