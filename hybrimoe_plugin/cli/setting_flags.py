"""Flags for the engine's settings, made from the fields of `Settings`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from typing import Any

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import Arguments, add_flag, path
from hybrimoe_plugin.config import OLD_SETTINGS, Settings, current_settings, parse_bytes
from hybrimoe_plugin.errors import ConfigError

_FIELDS = {item.name: item for item in fields(Settings)}
EXPERT = tuple(name for name, item in _FIELDS.items() if item.metadata.get("expert"))
"""Settings for rules and Python; their flags are accepted for one release, but not shown."""
OLD = tuple(old.name for old in OLD_SETTINGS)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting; flags override the rules."""
    group = parser.add_argument_group("engine", "These flags override the rules.")
    for name, item in _FIELDS.items():
        if name not in EXPERT:
            add_setting(group, name)
        else:
            _add(group, item, argparse.SUPPRESS)
    for old in OLD_SETTINGS:
        add_flag(
            group,
            old.name,
            choices=tuple(old.values),
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def add_setting(arguments: Arguments, name: str) -> None:
    """Add the flag of one setting; unless it is given, the result has no attribute of its name."""
    item = _FIELDS[name]
    facts = []
    span = _range(item)
    if span:
        facts.append(span)
    if item.default is not None:
        facts.append(f"default {item.default}")
    about = item.metadata["help"]
    if facts:
        about += f" ({', '.join(facts)})"
    _add(arguments, item, about.replace("%", "%%"))


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags, validated and under their current names.

    Raises:
        ConfigError: a value outside its range, or two that exclude each other.
    """
    given = {}
    for name in (*_FIELDS, *OLD):
        if hasattr(args, name):
            given[name] = getattr(args, name)
    for name in EXPERT:
        if name in given and not getattr(args, "quiet", False):
            notice(
                f"--{name} will be refused by the next release: write {name} into the rules, "
                "or give it to load_model"
            )
    current = current_settings(given)
    Settings.of(current)
    return current


def _add(arguments: Arguments, item: Field[Any], about: str) -> None:
    options: dict[str, Any] = {"help": about, "default": argparse.SUPPRESS}
    if "choices" in item.metadata:
        options["choices"] = item.metadata["choices"]
        options["type"] = partial(_current_value, item.name)
    else:
        options["type"] = _reader(item.name, str(item.type))
        options["metavar"] = _metavar(item)
    add_flag(arguments, item.name, **options)


def _metavar(item: Field[Any]) -> str:
    if item.name.endswith("_bytes"):
        return "BYTES"
    if str(item.type).startswith("str"):
        return "NAME|FILE"
    if str(item.type).startswith("int"):
        return "N"
    return f"{item.metadata['low']:g}..{item.metadata['high']:g}"


def _range(item: Field[Any]) -> str:
    low = item.metadata.get("low")
    high = item.metadata.get("high")
    if high is not None:
        # The value of a flag for fractions is called 0..1 already.
        return f"{low:g} to {high:g}" if str(item.type).startswith("int") else ""
    return f"at least {low:g}" if low else ""


def _current_value(name: str, text: str) -> str:
    """The value as it is written today; argparse compares it with the choices afterwards."""
    return str(current_settings({name: text})[name])


def _reader(name: str, kind: str) -> Callable[[str], Any]:
    """Reads the text of a flag as a value of the setting's type."""

    def read(text: str) -> Any:
        if text == "None" and "None" in kind:
            return None
        try:
            if name.endswith("_bytes"):
                return parse_bytes(text, name)
            if kind.startswith("int"):
                return int(text)
            return float(text) if kind.startswith("float") else path(text)
        except ConfigError as error:
            reason = str(error).removeprefix(f"{name}: ")
            raise argparse.ArgumentTypeError(reason) from error
        except ValueError as error:
            wanted = "a whole number" if kind.startswith("int") else "a number"
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}") from error

    return read
