"""Read YAML from outside as plain values that remember their lines; every fault is a `RulesError`.

PyYAML's safe loader is kept, but stopped early: it is recursive, expands aliases and lets a later
key replace an earlier one without a word.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from hybrimoe_plugin.errors import RulesError

MAX_BYTES = 256 * 1024
"""Ten times the largest rules file that kTransformers ships."""
MAX_DEPTH = 20
MAX_VALUES = 20_000
"""Values in one file, aliases counted each time they are used."""

MAX_NUMBER = 100
"""Characters of a number: with very many its conversion takes long, and Python does not print it.
"""

_SCALARS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")
)
_MAPPING = "tag:yaml.org,2002:map"
_SEQUENCE = "tag:yaml.org,2002:seq"


class _Loader(yaml.SafeLoader):
    """The safe loader with a limit on depth and on the number of nodes."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH or self._nodes > MAX_VALUES:
            what = (
                f"nested deeper than {MAX_DEPTH}"
                if self._depth > MAX_DEPTH
                else f"more than {MAX_VALUES} values"
            )
            raise yaml.composer.ComposerError(None, None, what, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


@dataclass(frozen=True)
class Field:
    """One key of a mapping: where it stands and the node of its value."""

    line: int
    node: yaml.Node


class Document:
    """One YAML document of a named source.

    Args:
        text: the document.
        source: how errors name it, usually the path.

    Raises:
        RulesError: not one well-formed document, or larger or deeper than any rules file needs to
            be.
    """

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._values = 0
        if len(text) > MAX_BYTES:
            self.fail(1, f"larger than {MAX_BYTES // 1024} KiB; this is not a rules file")
        self._loader: yaml.SafeLoader | None = None
        try:
            self._loader = _Loader(text)
            self.root = self._loader.get_single_node()
        except yaml.YAMLError as error:
            self.fail(_error_line(error), f"not valid YAML: {_describe(error)}")

    def fail(self, line: int, problem: str) -> NoReturn:
        """Raise the `RulesError` of a line, counted from 1."""
        raise RulesError(f"{self.source}:{line}: {problem}")

    def mapping(
        self, node: yaml.Node, what: str, allowed: Sequence[str] | None = None
    ) -> dict[str, Field]:
        """The fields of a mapping whose keys are text, merge keys (`<<`) resolved.

        Raises:
            RulesError: not a mapping, a duplicate key, or a key outside `allowed`.
        """
        if not isinstance(node, yaml.MappingNode) or node.tag != _MAPPING:
            self.fail(line_of(node), f"{what} must be a mapping, found {kind_of(node)}")
        found: dict[str, Field] = {}
        merged: dict[str, Field] = {}
        for key, value in node.value:
            self._spend(key)
            if key.tag == "tag:yaml.org,2002:merge":
                for field_name, field in self._merged(value, what, 0):
                    merged.setdefault(field_name, field)
                continue
            name = self.scalar(key)
            if not isinstance(name, str):
                self.fail(line_of(key), f"keys of {what} must be text, found {name!r}")
            if name in found:
                self.fail(
                    line_of(key),
                    f"{what} has the key {name!r} twice, first in line {found[name].line}",
                )
            found[name] = Field(line_of(key), value)
        fields = {**merged, **found}
        for name, field in fields.items():
            if allowed is not None and name not in allowed:
                self.fail(
                    field.line,
                    f"{what} has the unknown key {shorten(name)}{suggest(name, allowed)}",
                )
        return fields

    def _merged(self, node: yaml.Node, what: str, depth: int) -> Iterator[tuple[str, Field]]:
        self._spend(node)
        if depth > MAX_DEPTH:
            self.fail(line_of(node), f"{what} merges mappings too deeply")
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from self._merged(item, what, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._spend(key)
                if key.tag == "tag:yaml.org,2002:merge":
                    yield from self._merged(value, what, depth + 1)
                elif isinstance(key, yaml.ScalarNode):
                    yield str(key.value), Field(line_of(key), value)
        else:
            self.fail(line_of(node), f"{what}: << must name a mapping, found {kind_of(node)}")

    def scalar(self, node: yaml.Node) -> str | int | float | bool | None:
        """The value of a scalar.

        Raises:
            RulesError: not a scalar, or of a type that rules do not have (dates, binaries, Python
                objects).
        """
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            self.fail(
                line_of(node), f"expected text, a number, true or false, found {kind_of(node)}"
            )
        assert self._loader is not None
        if len(node.value) > MAX_NUMBER and node.tag != "tag:yaml.org,2002:str":
            self.fail(line_of(node), f"{shorten(str(node.value))} has too many digits")
        try:
            value: str | int | float | bool | None = self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError):
            # An explicit tag that its text does not fit (`!!int x`) leaves PyYAML by many doors.
            self.fail(
                line_of(node), f"{shorten(str(node.value))} is not a {node.tag.rpartition(':')[2]}"
            )
        return value

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        """The plain Python value of any node; lists and dicts are fresh, aliases expanded.

        Raises:
            RulesError: the node holds itself, expands to too much, or has values that rules do not
                have.
        """
        self._spend(node)
        if depth > MAX_DEPTH:
            self.fail(line_of(node), f"nested deeper than {MAX_DEPTH}")
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._plain_mapping(node, depth)
        return self.scalar(node)

    def _plain_mapping(self, node: yaml.MappingNode, depth: int) -> dict[Any, Any]:
        if node.tag != _MAPPING:
            self.fail(line_of(node), f"found {kind_of(node)} where a mapping fits")
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            fields = self.mapping(node, "this mapping")
            return {name: self.value(field.node, depth + 1) for name, field in fields.items()}
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            # kTransformers' transfer_map has whole numbers as keys.
            key = self.scalar(key_node)
            if key in found:
                self.fail(line_of(key_node), f"the key {key!r} stands here twice")
            found[key] = self.value(value_node, depth + 1)
        return found

    def _spend(self, node: yaml.Node) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            self.fail(line_of(node), f"aliases expand to more than {MAX_VALUES} values")


def line_of(node: yaml.Node) -> int:
    """The line, counted from 1, on which a node begins."""
    return int(node.start_mark.line) + 1


def kind_of(node: yaml.Node) -> str:
    """What a node is, in words for an error message."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null":
            return "nothing"
        return shorten(str(node.value)) if node.tag in _SCALARS else f"the tag {shorten(node.tag)}"
    if node.tag not in (_MAPPING, _SEQUENCE):
        return f"the tag {shorten(node.tag)}"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"


def shorten(text: str, limit: int = 60) -> str:
    """Quote outside text for a one-line message."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def suggest(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name[:60], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _error_line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return int(mark.line) + 1 if mark is not None else 1


def _describe(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(problem).split())
