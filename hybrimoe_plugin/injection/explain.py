"""Tell what an injection would do, as rows for a table; layers that are treated alike
share a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from hybrimoe_plugin.injection.match import Match

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    module: str
    """Qualified name; for several, `model.layers.{0-2,5}.mlp.experts`."""
    count: int
    original: str
    operator: str
    device: str
    rule: str
    """Position and line of the rule that took the modules, and of later ones that match them too.
    """


def explain_rows(plan: Sequence[Match], show_all: bool = False) -> list[Row]:
    """Rows of a plan, in the model's order.

    Args:
        plan: from `plan_injection`.
        show_all: one row per module instead of one per group of repeated layers.
    """
    groups: dict[tuple[object, ...], list[Match]] = {}
    for match in plan:
        name = match.name if show_all else _NUMBER.sub("*", match.name)
        key = (
            name,
            match.original,
            match.operator,
            _device(match),
            match.rule.index,
            match.shadowed,
        )
        groups.setdefault(key, []).append(match)
    return [_row(matches) for matches in groups.values()]


def untouched(model: nn.Module, plan: Sequence[Match]) -> int:
    """How many of a model's modules with weights of their own no rule takes."""
    taken = {match.name for match in plan}
    replaced = tuple(match.name + "." for match in plan if match.replaces)
    return sum(
        1
        for name, module in model.named_modules()
        if name not in taken
        and not name.startswith(replaced)
        and any(True for _ in module.parameters(recurse=False))
    )


def _row(matches: Sequence[Match]) -> Row:
    first = matches[0]
    rule = f"{first.rule.index} (line {first.rule.line})"
    if first.shadowed:
        rule += f", before {', '.join(str(index) for index in first.shadowed)}"
    names = [match.name for match in matches]
    return Row(_collapse(names), len(matches), first.original, first.operator, _device(first), rule)


def _device(match: Match) -> str:
    prefill, generate = match.kwargs.get("prefill_device"), match.kwargs.get("generate_device")
    if prefill is None and generate is None:
        return "host's choice" if not match.replaces else "operator's choice"
    if prefill is None or generate is None or prefill == generate:
        return str(generate if generate is not None else prefill)
    return f"prefill {prefill}, generate {generate}"


def _collapse(names: Sequence[str]) -> str:
    """One name for several that differ in numbers only; each number becomes the set of its
    values.
    """
    if len(names) == 1:
        return names[0]
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    sets = iter([sorted({int(value) for value in column}) for column in columns])
    return _NUMBER.sub(lambda _: _span(next(sets)), names[0])


def _span(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    return "{" + ",".join(_ranges(values)) + "}"


def _ranges(values: Sequence[int]) -> Iterable[str]:
    start = previous = values[0]
    for value in [*values[1:], None]:
        if value is not None and value == previous + 1:
            previous = value
            continue
        yield str(start) if start == previous else f"{start}-{previous}"
        if value is not None:
            start = previous = value
