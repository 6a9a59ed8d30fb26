"""Rules files: kTransformers' schema, read strictly and without importing what they name."""

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
"""`replace.class` of a rule that keeps the module and only says where it lives."""

TRUSTED = ("hybrimoe_plugin", "lever_ext", "ktransformers", "torch.nn", "transformers")
"""Packages from which a rule may import; importing runs code."""

DEVICE_KEYS = ("prefill_device", "generate_device")
RESERVED = ("key", "gguf_loader", "config", "orig_module")
"""What the injection itself hands to an operator."""

_DEVICE = re.compile(r"[a-z]+(:\d{1,3})?")


@dataclass(frozen=True)
class Rule:
    """One rule of a file: which modules it matches and what takes their place."""

    source: str
    """The file, as errors name it."""
    index: int
    """Position in the file, from 1."""
    line: int
    match_name: str | None
    """Regular expression, searched in the qualified module name."""
    match_class: str | None
    """Dotted path of a class that the module must be an instance of."""
    replace_class: str
    """Dotted path of the operator, or `default`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    recursive: bool = True
    """Whether rules are applied to the children of a matched module too."""
    lines: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Line of each part: `name`, `class`, `replace`, `kwargs.<key>`."""

    def line_of(self, part: str) -> int:
        """The line of a part of this rule, or of the rule."""
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
        raise RulesError(
            f"{file}: cannot read the rules file: {error.strerror or error}"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RulesError(
            f"{file}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); is it a YAML file?"
        ) from error
    return parse_rules(text, str(file))


def parse_rules(text: str, source: str = "<rules>") -> Rules:
    """Read rules from text.

    Args:
        text: YAML, a list of rules.
        source: how errors name it.

    Raises:
        RulesError: as `load_rules`.
    """
    document = Document(text, source)
    root = document.root
    if root is None:
        document.fail(1, "empty; a rules file is a list of rules, each with match and replace")
    if not isinstance(root, yaml.SequenceNode) or kind_of(root) != "a list":
        document.fail(
            line_of(root),
            f"a rules file is a list of rules ('- match: ...'), found {kind_of(root)}",
        )
    if not root.value:
        document.fail(line_of(root), "the list of rules is empty")
    rules = tuple(_rule(document, index, node) for index, node in enumerate(root.value, start=1))
    find_names(rules, ())
    return Rules(source, rules)


def find_names(rules: Sequence[Rule], names: Sequence[str]) -> list[frozenset[str]]:
    """For each rule, the qualified module names in which its pattern is found; all of them where it
    has none.

    Raises:
        RulesError: a pattern is no regular expression, or takes too much time or memory.
    """
    patterns = [rule.match_name for rule in rules if rule.match_name is not None]
    try:
        found = iter(search_all(patterns, names))
    except PatternError as error:
        rule = [rule for rule in rules if rule.match_name is not None][error.index]
        text = shorten(str(rule.match_name))
        raise rule.error(f"match.name of rule {rule.index}, {text}, {error}", "name") from error
    return [frozenset(names) if rule.match_name is None else next(found) for rule in rules]


def _rule(document: Document, index: int, node: yaml.Node) -> Rule:
    what = f"rule {index}"
    top = document.mapping(node, what, ("match", "replace", "recursive"))
    line = line_of(node)
    for key in ("match", "replace"):
        if key not in top:
            document.fail(line, f"{what} has no {key!r}; a rule has match and replace")
    match = document.mapping(top["match"].node, f"match of {what}", ("name", "class"))
    if not match:
        document.fail(top["match"].line, f"match of {what} needs 'name', 'class' or both")
    replace = document.mapping(top["replace"].node, f"replace of {what}", ("class", "kwargs"))
    kwargs, kwarg_lines = _kwargs(document, what, replace.get("kwargs"))
    lines = {key: entry.line for key, entry in match.items()}
    lines["replace"] = replace["class"].line if "class" in replace else top["replace"].line
    operator = (
        _class_path(document, replace["class"], f"replace.class of {what}")
        if "class" in replace
        else DEFAULT
    )
    if operator == DEFAULT:
        for key in kwargs:
            if key not in DEVICE_KEYS:
                known = " and ".join(DEVICE_KEYS)
                document.fail(
                    kwarg_lines[f"kwargs.{key}"],
                    f"class: default takes {known} only, found {shorten(key)}",
                )
    return Rule(
        source=document.source,
        index=index,
        line=line,
        match_name=_text(document, match["name"], f"match.name of {what}")
        if "name" in match
        else None,
        match_class=_match_class(document, match["class"], what) if "class" in match else None,
        replace_class=operator,
        kwargs=MappingProxyType(kwargs),
        recursive=_recursive(document, top.get("recursive"), what),
        lines=MappingProxyType({**lines, **kwarg_lines}),
    )


def _text(document: Document, entry: Field, what: str) -> str:
    value = document.scalar(entry.node)
    if not isinstance(value, str) or not value.strip():
        document.fail(entry.line, f"{what} must be text, found {value!r}")
    return value


def _class_path(document: Document, entry: Field, what: str) -> str:
    path = _text(document, entry, what)
    if path != DEFAULT and (
        path.count(".") < 1 or not all(part.isidentifier() for part in path.split("."))
    ):
        document.fail(
            entry.line,
            f"{what} must be a dotted class path such as package.module.Class, found "
            f"{shorten(path)}",
        )
    return path


def _match_class(document: Document, entry: Field, what: str) -> str:
    path = _class_path(document, entry, f"match.class of {what}")
    if path == DEFAULT:
        document.fail(
            entry.line, f"match.class of {what} must be a dotted class path, found 'default'"
        )
    return path


def _recursive(document: Document, entry: Field | None, what: str) -> bool:
    if entry is None:
        return True
    value = document.scalar(entry.node)
    if not isinstance(value, bool):
        document.fail(entry.line, f"recursive of {what} must be True or False, found {value!r}")
    return value


def _kwargs(
    document: Document, what: str, entry: Field | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """The values and lines of a rule's kwargs."""
    if entry is None:
        return {}, {}
    fields = document.mapping(entry.node, f"kwargs of {what}")
    values: dict[str, Any] = {}
    for name, found in fields.items():
        if not name.isidentifier() or name in RESERVED:
            reason = (
                "the injection fills it in itself" if name in RESERVED else "it is no argument name"
            )
            document.fail(found.line, f"kwargs of {what} cannot have {shorten(name)}: {reason}")
        values[name] = document.value(found.node)
        if name in DEVICE_KEYS and not (
            isinstance(values[name], str) and _DEVICE.fullmatch(values[name])
        ):
            document.fail(
                found.line,
                f"{name} of {what}: expected cpu, cuda, cuda:N or auto, found "
                f"{kind_of(found.node)}",
            )
    return values, {f"kwargs.{name}": found.line for name, found in fields.items()}


def is_trusted(path: str) -> bool:
    """Whether a dotted class path lies in a package that rules may import without being trusted."""
    return any(path.startswith(package + ".") for package in TRUSTED)
