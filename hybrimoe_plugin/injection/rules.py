"""Rules files in kTransformers' schema, read strictly; no class that they name is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from hybrimoe_plugin.errors import RulesError
from hybrimoe_plugin.files import read_regular
from hybrimoe_plugin.injection.patterns import PatternError, search_all
from hybrimoe_plugin.injection.yaml_nodes import (
    MAX_BYTES,
    Document,
    Field,
    kind_of,
    line_of,
    shorten,
)

DEFAULT = "default"
"""`replace.class` of a rule that keeps the module and only places it on a device."""

TRUSTED = ("hybrimoe_plugin", "lever_ext", "ktransformers", "torch.nn", "transformers")
"""Packages from which a rule may import; importing runs code."""

DEVICE_KEYS = ("prefill_device", "generate_device")
RESERVED = ("key", "gguf_loader", "config", "orig_module")
"""Arguments of an operator that the injection itself supplies."""

_DEVICE = re.compile(r"[a-z]+(:\d{1,3})?")


@dataclass(frozen=True)
class Rule:
    """A rule of a file: which modules it matches and what replaces them."""

    source: str
    """Name of the file in errors."""
    index: int
    """Position in the file, counted from 1."""
    line: int
    match_name: str | None
    """Regular expression, searched in the qualified module name."""
    match_class: str | None
    """Dotted path of a class that the module must be an instance of."""
    replace_class: str
    """Dotted path of the operator, or `default`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    recursive: bool = True
    """Whether rules apply to the children of a matched module too."""
    lines: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Line of each part: `name`, `class`, `replace`, `kwargs.<key>`."""

    def line_of(self, part: str) -> int:
        """The line of a part of this rule; of the rule itself where the part is unknown."""
        return self.lines.get(part, self.line)

    def error(self, problem: str, part: str = "") -> RulesError:
        """The error about a part of this rule, with file and line."""
        return RulesError(f"{self.source}:{self.line_of(part)}: {problem}")


@dataclass(frozen=True)
class Rules:
    """The rules of one file, in order: the first that matches a module wins."""

    source: str
    rules: tuple[Rule, ...]


def load_rules(path: str | os.PathLike[str]) -> Rules:
    """Read a rules file.

    Raises:
        RulesError: the file cannot be read or is not a valid rules file; names file, line and what
            was found.
    """
    file = Path(path)
    try:
        raw = read_regular(file, MAX_BYTES)
    except OSError as error:
        reason = error.strerror or error
        raise RulesError(f"{file}: cannot read the rules file: {reason}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        byte = raw[error.start]
        raise RulesError(
            f"{file}:{line}: not UTF-8 text (byte 0x{byte:02x}); is it a YAML file?"
        ) from error
    return parse_rules(text, str(file))


def parse_rules(text: str, source: str = "<rules>") -> Rules:
    """Read rules from text.

    Args:
        text: YAML, a list of rules.
        source: its name in errors.

    Raises:
        RulesError: as `load_rules`.
    """
    document = Document(text, source)
    root = document.root
    if root is None:
        document.fail(1, "empty; a rules file is a list of rules, each with match and replace")
    if not isinstance(root, yaml.SequenceNode) or kind_of(root) != "a list":
        found = kind_of(root)
        document.fail_at(root, f"a rules file is a list of rules ('- match: ...'), found {found}")
    if not root.value:
        document.fail_at(root, "the list of rules is empty")
    rules = []
    for index, node in enumerate(root.value, start=1):
        rules.append(_rule(document, index, node))
    find_names(rules, ())
    return Rules(source, tuple(rules))


def find_names(rules: Sequence[Rule], names: Sequence[str]) -> list[frozenset[str]]:
    """The module names that each rule's pattern matches; all names for a rule without a pattern.

    Args:
        rules: the rules.
        names: qualified module names.

    Raises:
        RulesError: a pattern is no regular expression, or takes too much time or memory.
    """
    named = [rule for rule in rules if rule.match_name is not None]
    patterns = [str(rule.match_name) for rule in named]
    try:
        matches = search_all(patterns, names)
    except PatternError as error:
        rule = named[error.index]
        text = shorten(patterns[error.index])
        raise rule.error(f"match.name of rule {rule.index}, {text}, {error}", "name") from None
    found = []
    every = frozenset(names)
    remaining = iter(matches)
    for rule in rules:
        matched = every if rule.match_name is None else next(remaining)
        found.append(matched)
    return found


def _rule(document: Document, index: int, node: yaml.Node) -> Rule:
    what = f"rule {index}"
    top = document.mapping(node, what, ("match", "replace", "recursive"))
    for key in ("match", "replace"):
        if key not in top:
            document.fail_at(node, f"{what} has no {key!r}; a rule has match and replace")
    match = document.mapping(top["match"].node, f"match of {what}", ("name", "class"))
    if not match:
        document.fail(top["match"].line, f"match of {what} needs 'name', 'class' or both")
    match_name = None
    if "name" in match:
        match_name = _text(document, match["name"], f"match.name of {what}")
    match_class = None
    if "class" in match:
        match_class = _match_class(document, match["class"], what)
    lines = {name: entry.line for name, entry in match.items()}

    replace = document.mapping(top["replace"].node, f"replace of {what}", ("class", "kwargs"))
    operator = DEFAULT
    lines["replace"] = top["replace"].line
    if "class" in replace:
        operator = _class_path(document, replace["class"], f"replace.class of {what}")
        lines["replace"] = replace["class"].line
    fields = _kwarg_fields(document, what, replace.get("kwargs"))
    if operator == DEFAULT:
        _check_default(document, fields)
    kwargs = {}
    for name, entry in fields.items():
        kwargs[name] = _kwarg(document, what, name, entry)
        lines[f"kwargs.{name}"] = entry.line
    return Rule(
        source=document.source,
        index=index,
        line=line_of(node),
        match_name=match_name,
        match_class=match_class,
        replace_class=operator,
        kwargs=MappingProxyType(kwargs),
        recursive=_recursive(document, top.get("recursive"), what),
        lines=MappingProxyType(lines),
    )


def _text(document: Document, entry: Field, what: str) -> str:
    value = document.scalar(entry.node)
    if not isinstance(value, str) or not value.strip():
        document.fail(entry.line, f"{what} must be text, found {value!r}")
    return value


def _class_path(document: Document, entry: Field, what: str) -> str:
    path = _text(document, entry, what)
    if path == DEFAULT:
        return path
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        found = shorten(path)
        document.fail(
            entry.line,
            f"{what} must be a dotted class path such as package.module.Class, found {found}",
        )
    return path


def _match_class(document: Document, entry: Field, what: str) -> str:
    what = f"match.class of {what}"
    path = _class_path(document, entry, what)
    if path == DEFAULT:
        document.fail(entry.line, f"{what} must be a dotted class path, found 'default'")
    return path


def _recursive(document: Document, entry: Field | None, what: str) -> bool:
    if entry is None:
        return True
    value = document.scalar(entry.node)
    if not isinstance(value, bool):
        document.fail(entry.line, f"recursive of {what} must be True or False, found {value!r}")
    return value


def _kwarg_fields(document: Document, what: str, entry: Field | None) -> dict[str, Field]:
    """A rule's kwargs by name."""
    if entry is None:
        return {}
    fields = document.mapping(entry.node, f"kwargs of {what}")
    for name, found in fields.items():
        start = f"kwargs of {what} cannot have {shorten(name)}"
        if name in RESERVED:
            document.fail(found.line, f"{start}: the injection fills it in itself")
        if not name.isidentifier():
            document.fail(found.line, f"{start}: it is no argument name")
    return fields


def _check_default(document: Document, kwargs: Mapping[str, Field]) -> None:
    """`class: default` only places a module."""
    for name, entry in kwargs.items():
        if name not in DEVICE_KEYS:
            known = " and ".join(DEVICE_KEYS)
            document.fail(entry.line, f"class: default takes {known} only, found {shorten(name)}")


def _kwarg(document: Document, what: str, name: str, entry: Field) -> Any:
    """The value of one of a rule's kwargs."""
    value = document.value(entry.node)
    if name not in DEVICE_KEYS:
        return value
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        found = kind_of(entry.node)
        document.fail(
            entry.line, f"{name} of {what}: expected cpu, cuda, cuda:N or auto, found {found}"
        )
    return value


def is_trusted(path: str) -> bool:
    """Whether every rules file may import from the package of a dotted class path."""
    return any(path.startswith(package + ".") for package in TRUSTED)
