"""What every setting of a plan is, and who has set it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from hybrimoe_plugin.config import OLD_SETTINGS, Settings
from hybrimoe_plugin.injection.explain import grouped
from hybrimoe_plugin.injection.match import Match


@dataclass(frozen=True)
class SettingRow:
    """One value of one setting."""

    name: str
    value: str
    set_by: str
    """`default`, a flag, or rules and their lines; empty where no operator uses the setting."""
    modules: str
    """The modules that have this value; empty where all have the same."""


def setting_rows(plan: Sequence[Match]) -> list[SettingRow]:
    """Every setting, in the order of `Settings`; several rows where operators differ."""
    found = []
    for item in fields(Settings):
        values: dict[str, list[Match]] = {}
        for match in plan:
            if item.name in getattr(match.operator_class, "uses", ()):
                value = match.kwargs.get(item.name, item.default)
                values.setdefault(_shown(value), []).append(match)
        if not values:
            found.append(SettingRow(item.name, _shown(item.default), "", ""))
        for value, matches in values.items():
            givers = dict.fromkeys(_set_by(match, item.name) for match in matches)
            modules = grouped([match.name for match in matches]) if len(values) > 1 else ""
            found.append(SettingRow(item.name, value, ", ".join(givers), modules))
    return found


def _set_by(match: Match, name: str) -> str:
    if name in match.given:
        return f"--{name}"
    old = [old.name for old in OLD_SETTINGS if old.now == name]
    for written in (name, *old):
        if written in match.rule.kwargs:
            line = match.rule.line_of(f"kwargs.{written}")
            return f"rule {match.rule.index} (line {line})"
    return "default"


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
