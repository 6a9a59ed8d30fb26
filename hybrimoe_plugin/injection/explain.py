"""Describe an injection as rows of a table; layers treated alike share a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hybrimoe_plugin.injection.match import Match

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    module: str
    """Qualified name; a group is written `model.layers.{0-2,5}.mlp.experts`."""
    count: int
    original: str
    operator: str
    device: str
    rule: str
    """Position and line of the rule that takes the modules; positions of later ones that match."""


@dataclass(frozen=True)
class Untouched:
    """Modules that are left as they are."""

    module: str
    """As in `Row`."""
    count: int
    original: str


def explain_rows(plan: Sequence[Match], show_all: bool = False) -> list[Row]:
    """Rows of a plan, in the model's order.

    Args:
        plan: from `plan_injection`.
        show_all: one row per module instead of one per group of repeated layers.
    """
    groups: dict[tuple[object, ...], list[Match]] = {}
    for match in plan:
        key = (
            match.name if show_all else _NUMBER.sub("*", match.name),
            match.original,
            match.operator,
            _device(match),
            match.rule.index,
            match.shadowed,
        )
        groups.setdefault(key, []).append(match)
    return [_row(matches) for matches in groups.values()]


def untouched(model: nn.Module, plan: Sequence[Match]) -> list[Untouched]:
    """Modules with weights of their own that no rule takes, grouped like rows.

    Args:
        model: as it was when the plan was made.
    """
    taken = {match.name for match in plan}
    # The children of other replaced modules stay in the model, as rules may match them too.
    whole = tuple(match.name + "." for match in plan if match.replaces and not match.rule.recursive)
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if name in taken or name.startswith(whole):
            continue
        if any(True for _ in module.parameters(recurse=False)):
            kind = type(module).__name__
            groups.setdefault((_NUMBER.sub("*", name), kind), []).append(name)
    return [Untouched(collapsed(names), len(names), kind) for (_, kind), names in groups.items()]


def _row(matches: Sequence[Match]) -> Row:
    first = matches[0]
    rule = f"{first.rule.index} (line {first.rule.line})"
    if first.shadowed:
        later = ", ".join(str(index) for index in first.shadowed)
        rule += f", before {later}"
    return Row(
        module=collapsed([match.name for match in matches]),
        count=len(matches),
        original=first.original,
        operator=first.operator,
        device=_device(first),
        rule=rule,
    )


def _device(match: Match) -> str:
    prefill = match.kwargs.get("prefill_device")
    generate = match.kwargs.get("generate_device")
    if prefill is None and generate is None:
        return "its own choice" if match.replaces else "host's choice"
    if prefill is None or prefill == generate:
        return str(generate)
    if generate is None:
        return str(prefill)
    return f"prefill {prefill}, generate {generate}"


def collapsed(names: Sequence[str]) -> str:
    """One name for several that differ in numbers only; a number becomes the set of its values.

    >>> collapsed(["layers.0.mlp", "layers.1.mlp", "layers.4.mlp"])
    'layers.{0-1,4}.mlp'
    """
    if len(names) == 1:
        return names[0]
    numbers = [_NUMBER.findall(name) for name in names]
    spans = []
    for column in zip(*numbers, strict=True):
        values = {int(value) for value in column}
        spans.append(_span(sorted(values)))
    replacements = iter(spans)
    return _NUMBER.sub(lambda _: next(replacements), names[0])


def grouped(names: Sequence[str]) -> str:
    """Names as one text; those that differ in more than numbers are kept apart."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("*", name), []).append(name)
    return ", ".join(collapsed(group) for group in groups.values())


def _span(values: Sequence[int]) -> str:
    """Sorted numbers as `7` or `{0-2,5}`."""
    if len(values) == 1:
        return str(values[0])
    ranges = [[values[0], values[0]]]
    for value in values[1:]:
        if value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    parts = []
    for first, last in ranges:
        parts.append(str(first) if first == last else f"{first}-{last}")
    return "{" + ",".join(parts) + "}"
