"""Read untrusted YAML as plain values with line numbers; every fault is a `RulesError`.

PyYAML's safe loader does the parsing, within limits: it is recursive, expands aliases, and lets a
later key replace an earlier one silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from hybrimoe_plugin.errors import RulesError, did_you_mean

MAX_BYTES = 256 * 1024
"""Size limit of a file: ten times the largest rules file that kTransformers ships."""
MAX_DEPTH = 20
MAX_VALUES = 20_000
"""Limit of values in one file; an alias counts each time it is used."""
MAX_NUMBER = 100
"""Limit of characters in a number: longer ones convert slowly, and Python refuses to print them."""

Scalar = str | int | float | bool | None

_TAG = "tag:yaml.org,2002:"
_TEXT = _TAG + "str"
_NULL = _TAG + "null"
_MERGE = _TAG + "merge"
_MAPPING = _TAG + "map"
_SEQUENCE = _TAG + "seq"
_SCALARS = frozenset(
    {
        _TEXT,
        _NULL,
        _TAG + "int",
        _TAG + "float",
        _TAG + "bool",
    }
)


class _Loader(yaml.SafeLoader):
    """The safe loader with a limit on depth and on the number of nodes."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH}")
        if self._nodes > MAX_VALUES:
            self._refuse(f"more than {MAX_VALUES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, problem: str) -> NoReturn:
        mark = self.peek_event().start_mark
        raise yaml.composer.ComposerError(None, None, problem, mark)


@dataclass(frozen=True)
class Field:
    """A key of a mapping: its line and the node of its value."""

    line: int
    node: Node


class Document:
    """A YAML document.

    Args:
        text: the document.
        source: its name in errors, usually the path.

    Raises:
        RulesError: the text is not one well-formed document, or exceeds a limit of size or depth.
    """

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._values = 0
        if len(text) > MAX_BYTES:
            limit = MAX_BYTES >> 10
            self.fail(1, f"larger than {limit} KiB; this is not a rules file")
        try:
            self._loader = _Loader(text)
            self.root = self._loader.get_single_node()
        except yaml.YAMLError as error:
            problem = _describe(error)
            self.fail(_error_line(error), f"not valid YAML: {problem}")

    def fail(self, line: int, problem: str) -> NoReturn:
        """Raise the `RulesError` about a line, counted from 1."""
        raise RulesError(f"{self.source}:{line}: {problem}")

    def fail_at(self, node: Node, problem: str) -> NoReturn:
        """Raise the `RulesError` about a node."""
        self.fail(line_of(node), problem)

    def mapping(
        self, node: Node, what: str, allowed: Sequence[str] | None = None
    ) -> dict[str, Field]:
        """The fields of a mapping with text keys; merge keys (`<<`) are resolved.

        Args:
            node: the mapping.
            what: its name in errors.
            allowed: the keys that it may have; None: any.

        Raises:
            RulesError: not a mapping, a duplicate key, or a key outside `allowed`.
        """
        if not _is_mapping(node):
            self.fail_at(node, f"{what} must be a mapping, found {kind_of(node)}")
        own: dict[str, Field] = {}
        merged: dict[str, Field] = {}
        for key, value in node.value:
            self._count(key)
            if key.tag == _MERGE:
                for name, field in self._merged(value, what, 0):
                    merged.setdefault(name, field)
                continue
            name = self._key(key, what)
            if name in own:
                first = own[name].line
                self.fail_at(key, f"{what} has the key {name!r} twice, first in line {first}")
            own[name] = Field(line_of(key), value)
        # A mapping's own keys override those that it merges.
        fields = {**merged, **own}
        if allowed is not None:
            self._check_names(fields, what, allowed)
        return fields

    def _key(self, node: Node, what: str) -> str:
        name = self.scalar(node)
        if not isinstance(name, str):
            self.fail_at(node, f"keys of {what} must be text, found {name!r}")
        return name

    def _check_names(self, fields: dict[str, Field], what: str, allowed: Sequence[str]) -> None:
        for name, field in fields.items():
            if name in allowed:
                continue
            found = shorten(name)
            hint = suggest(name, allowed)
            self.fail(field.line, f"{what} has the unknown key {found}{hint}")

    def _merged(self, node: Node, what: str, depth: int) -> Iterator[tuple[str, Field]]:
        """The fields of the mappings that a merge key names, the first mapping first."""
        self._count(node)
        if depth > MAX_DEPTH:
            self.fail_at(node, f"{what} merges mappings too deeply")
        if isinstance(node, SequenceNode):
            for item in node.value:
                yield from self._merged(item, what, depth + 1)
            return
        if not isinstance(node, MappingNode):
            found = kind_of(node)
            self.fail_at(node, f"{what}: << must name a mapping, found {found}")
        for key, value in node.value:
            self._count(key)
            if key.tag == _MERGE:
                yield from self._merged(value, what, depth + 1)
            elif isinstance(key, ScalarNode):
                field = Field(line_of(key), value)
                yield str(key.value), field

    def scalar(self, node: Node) -> Scalar:
        """The value of a scalar.

        Raises:
            RulesError: not a scalar, or a type that rules do not have (dates, binary data, Python
                objects).
        """
        if not _is_scalar(node):
            found = kind_of(node)
            self.fail_at(node, f"expected text, a number, true or false, found {found}")
        text = str(node.value)
        if node.tag != _TEXT and len(text) > MAX_NUMBER:
            self.fail_at(node, f"{shorten(text)} has too many digits")
        try:
            value: Scalar = self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError):
            # PyYAML raises any of these for an explicit tag that its text does not fit: `!!int x`.
            wanted = node.tag.removeprefix(_TAG)
            self.fail_at(node, f"{shorten(text)} is not a {wanted}")
        return value

    def value(self, node: Node, depth: int = 0) -> Any:
        """The plain Python value of any node; lists and dicts are new, aliases are expanded.

        Raises:
            RulesError: the node contains itself, expands to too many values, or contains a type
                that rules do not have.
        """
        self._count(node)
        if depth > MAX_DEPTH:
            self.fail_at(node, f"nested deeper than {MAX_DEPTH}")
        if isinstance(node, SequenceNode) and node.tag == _SEQUENCE:
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, MappingNode):
            return self._plain_mapping(node, depth)
        return self.scalar(node)

    def _plain_mapping(self, node: MappingNode, depth: int) -> dict[Any, Any]:
        if node.tag != _MAPPING:
            found = kind_of(node)
            self.fail_at(node, f"found {found} where a mapping fits")
        values: dict[Any, Any] = {}
        tags = [key.tag for key, _ in node.value]
        if _MERGE in tags:
            fields = self.mapping(node, "this mapping")
            for name, field in fields.items():
                values[name] = self.value(field.node, depth + 1)
            return values
        for key_node, value_node in node.value:
            # Any scalar: keys of kTransformers' transfer_map are whole numbers.
            key = self.scalar(key_node)
            if key in values:
                self.fail_at(key_node, f"this mapping has the key {key!r} twice")
            values[key] = self.value(value_node, depth + 1)
        return values

    def _count(self, node: Node) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            self.fail_at(node, f"aliases expand to more than {MAX_VALUES} values")


def line_of(node: Node) -> int:
    """The line, counted from 1, on which a node begins."""
    line: int = node.start_mark.line
    return line + 1


def kind_of(node: Node) -> str:
    """What a node is, in words for an error message."""
    if _is_mapping(node):
        return "a mapping"
    if isinstance(node, SequenceNode) and node.tag == _SEQUENCE:
        return "a list"
    if not _is_scalar(node):
        return f"the tag {shorten(node.tag)}"
    if node.tag == _NULL:
        return "nothing"
    return shorten(str(node.value))


def _is_mapping(node: Node) -> bool:
    return isinstance(node, MappingNode) and node.tag == _MAPPING


def _is_scalar(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag in _SCALARS


def shorten(text: str, limit: int = 60) -> str:
    """Quote untrusted text for a one-line message."""
    if len(text) > limit:
        kept = limit - 3
        text = text[:kept] + "..."
    return repr(text)


def suggest(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown name: the nearest known name, or all of them."""
    names = ", ".join(known)
    return did_you_mean(name, known) or f"; known: {names}"


def _error_line(error: yaml.YAMLError) -> int:
    for name in ("problem_mark", "context_mark"):
        mark = getattr(error, name, None)
        if mark is not None:
            return int(mark.line) + 1
    return 1


def _describe(error: yaml.YAMLError) -> str:
    for name in ("problem", "reason"):
        problem = getattr(error, name, None)
        if problem:
            return _one_line(str(problem))
    return _one_line(str(error))


def _one_line(text: str) -> str:
    words = text.split()
    return " ".join(words)
