"""Flags as typed for kTransformers: `--flag value`, `--flag=value`, `--flag True`, `--noflag`,
`--a-flag`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from hybrimoe_plugin.config import Settings, parse_bytes
from hybrimoe_plugin.errors import ConfigError

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")

Arguments = argparse.ArgumentParser | argparse._ArgumentGroup


class Parser(argparse.ArgumentParser):
    """A parser whose errors are this project's, to be told in one line like any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help)")


def underscored(argv: Sequence[str]) -> list[str]:
    """The same arguments with every `--some-flag` written `--some_flag`; values are left as they
    are.
    """
    found: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return found + list(argv[position:])
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            word = "--" + flag[2:].replace("-", "_") + equals + value
        found.append(word)
    return found


def truth(text: str) -> bool:
    """True or False as Python, YAML and shells write them."""
    if text.lower() in _TRUE or text.lower() in _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


def add_flag(arguments: Arguments, name: str, *aliases: str, **options: Any) -> None:
    """Add `--name` and its aliases; `underscored` lets users write them with `-` too."""
    # argparse would name the value after the flag in capitals; a plain letter reads better.
    if "choices" not in options and "action" not in options:
        options.setdefault("metavar", "X")
    arguments.add_argument(*(f"--{word}" for word in (name, *aliases)), dest=name, **options)


def add_switch(arguments: Arguments, name: str, help: str, default: bool | None = False) -> None:
    """Add a flag that is true when given bare, and takes True or False; `--noname` and `--no_name`
    turn it off.
    """
    add_flag(
        arguments,
        name,
        type=truth,
        nargs="?",
        const=True,
        default=default,
        metavar="True|False",
        help=help,
    )
    off = f"--no{name}", f"--no_{name}"
    arguments.add_argument(
        *off, dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


SEEDS = 2**64 - 1
"""The largest seed of torch's generators."""


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reader of whole numbers of at least `low`, and at most `high`."""
    span = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected a whole number {span}, found {text!r}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """Reader of numbers from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to {high:g}, found {text!r}"
            )
        return value

    return read


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of `Settings`; those that are given override what the rules say."""
    group = parser.add_argument_group(
        "engine",
        "override what the rules say; see the rules file for the values in force otherwise",
    )
    for item in fields(Settings):
        choices = item.metadata.get("choices")
        about = item.metadata["help"] + ("" if choices else _range(item.metadata))
        if item.default is not None:
            about += f" (default {item.default})"
        options: dict[str, Any] = {"help": about.replace("%", "%%"), "default": argparse.SUPPRESS}
        options |= {"choices": choices} if choices else {"type": _reader(item.name, str(item.type))}
        add_flag(group, item.name, **options)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, validated; unset ones are left out.

    Raises:
        ConfigError: a value outside its range, or two that exclude each other.
    """
    given = {
        item.name: getattr(args, item.name) for item in fields(Settings) if hasattr(args, item.name)
    }
    Settings.of(given)
    return given


def _range(metadata: Any) -> str:
    low, high = metadata.get("low"), metadata.get("high")
    if low is None:
        return ""
    return f", {low:g} to {high:g}" if high is not None else f", at least {low:g}"


def _reader(name: str, kind: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if "None" in kind and text == "None":
            return None
        try:
            if name.endswith("_bytes"):
                return parse_bytes(text, name)
            return (
                int(text)
                if kind.startswith("int")
                else float(text)
                if kind.startswith("float")
                else text
            )
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from error
        except ValueError as error:
            wanted = "a whole number" if kind.startswith("int") else "a number"
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}") from error

    return read


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that name a model."""
    group = parser.add_argument_group("model")
    add_flag(
        group,
        "model_path",
        metavar="DIR",
        help="directory with config.json and tokenizer; default: from the GGUF",
    )
    add_flag(
        group,
        "gguf_path",
        metavar="PATH",
        help="GGUF file, or directory with one model's GGUF file or split set",
    )
    return group
