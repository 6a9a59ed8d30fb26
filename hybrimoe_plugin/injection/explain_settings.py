"""What every setting of a plan is, and who has set it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from hybrimoe_plugin.config import OLD_SETTINGS, Settings
from hybrimoe_plugin.injection.explain import grouped
from hybrimoe_plugin.injection.match import Match

_DEFAULT = "default"


@dataclass(frozen=True)
class SettingRow:
    """One value of one setting."""

    name: str
    value: str
    set_by: str
    """`default`, a flag, or rules and their lines; empty where no operator uses the setting."""
    modules: str
    """The modules that have this value; empty where all have the same."""


def setting_rows(
    plan: Sequence[Match], flags: Mapping[str, str] = MappingProxyType({})
) -> list[SettingRow]:
    """Every setting, in the order of `Settings`; several rows where operators differ.

    Args:
        flags: setting -> the flag that gave it, where this is not the one of its name.
    """
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
            # Rules by their numbers, flags and defaults first.
            givers = sorted({_set_by(match, item.name, flags) for match in matches})
            named = ", ".join(name for _, name in givers)
            modules = grouped([match.name for match in matches]) if len(values) > 1 else ""
            found.append(SettingRow(item.name, value, named, modules))
    return found


def set_names(rows: Sequence[SettingRow]) -> set[str]:
    """Names of the settings that a flag or a rule has set, for some module at least."""
    return {row.name for row in rows if row.set_by not in ("", _DEFAULT)}


def _set_by(match: Match, name: str, flags: Mapping[str, str]) -> tuple[int, str]:
    """(index of the rule or 0, who has set it)."""
    if name in match.given:
        return 0, f"--{flags.get(name, name)}"
    old = [old.name for old in OLD_SETTINGS if old.now == name]
    for written in (name, *old):
        if written in match.rule.kwargs:
            line = match.rule.line_of(f"kwargs.{written}")
            return match.rule.index, f"rule {match.rule.index} (line {line})"
    return 0, _DEFAULT


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
