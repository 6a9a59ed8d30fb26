"""Write docs/settings.md from the code: `python scripts/settings_doc.py [--check]`.

Engine settings come from the fields of `Settings`, flags from the commands' own argument parsers,
so the page cannot say anything that the program does not. `--check` writes nothing and exits with 1
where the page is stale.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cli.main import COMMANDS
from hybrimoe_plugin.config import Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

TYPES = {"str": "text", "int": "whole number", "float": "number"}
"""Annotation -> the word for it on the page."""

TITLES = {"positional arguments": "arguments", "options": "flags"}
"""argparse's titles of its two default groups -> ours."""

ESCAPES = {"|": "\\|", "<": "&lt;", "*": "\\*"}

Row = tuple[str, ...]
"""The cells of one row of a table."""

HEAD = """\
# Settings and flags

<!-- Written by scripts/settings_doc.py from the code. Change the code, then run that script. -->

Engine settings have the same name and the same meaning in three places:

- in a rules file, as `kwargs` of `HybriMoEExperts` ([rules.md](rules.md));
- on the command line, as `--name value`, which overrides the rules;
- in Python, as keyword arguments of `load_model`, which override the rules too.

Sizes are a number of bytes or a text such as `4GiB` or `500MB`. A value outside the allowed range
is an error that names the setting, the value found and the values allowed.
"""

ENVIRONMENT = """\
## Environment variables

| variable | meaning |
|---|---|
| `HYBRIMOE_CACHE` | Folder for what is kept between runs, instead of `~/.cache/hybrimoe`; \
`hybrimoe cache` lists and clears it. |
| `HYBRIMOE_BUSY=keep` | Store a machine profile even if other programs used the processor while \
it was measured. |
| `HYBRIMOE_COMMIT` | Commit that benchmark results name where there is no `.git` folder. |
| `HYBRIMOE_LONG` | How many times as many cases the stress tests run. |
"""


def page() -> str:
    """The whole page."""
    parsers = {}
    for command in COMMANDS:
        parsers[command.name] = _parser(command)
    parts = [HEAD, _settings_section(parsers["local_chat"])]
    for command in COMMANDS:
        section = _command_section(command, parsers[command.name])
        parts.append(section)
    parts.append(ENVIRONMENT)
    return "\n".join(parts)


def _parser(command: Any) -> argparse.ArgumentParser:
    """The command's own parser, with nothing but its own flags."""
    parser = argparse.ArgumentParser(add_help=False)
    module = importlib.import_module(command.module)
    module.add_arguments(parser)
    return parser


def _settings_section(chat: argparse.ArgumentParser) -> str:
    flags: set[str] = set()
    for action in chat._actions:
        if action.help != argparse.SUPPRESS:
            flags.update(action.option_strings)
    rows = []
    for item in fields(Settings):
        has_flag = f"--{item.name}" in flags
        row = _setting_row(item, has_flag)
        rows.append(row)
    heading = ("setting", "type", "default", "allowed", "meaning")
    return "## Engine settings\n\n" + _table(heading, rows)


def _setting_row(item: Field[Any], has_flag: bool) -> Row:
    name = f"`{item.name}`"
    if not has_flag:
        name += " (rules and Python only)"
    default = f"`{item.default}`"
    if item.default is None:
        default = ""
    meaning = _escaped(item.metadata["help"])
    return name, _type(item), default, _allowed(item.metadata), meaning


def _type(item: Field[Any]) -> str:
    if item.name.endswith("_bytes"):
        return "size"
    kind = str(item.type)
    without_none = kind.partition(" ")[0]
    return TYPES.get(without_none, without_none)


def _allowed(metadata: Mapping[str, Any]) -> str:
    if "choices" in metadata:
        return _codes(metadata["choices"])
    low = metadata.get("low")
    high = metadata.get("high")
    if low is None:
        return ""
    if high is None:
        return f"at least {low:g}"
    return f"{low:g} to {high:g}"


def _command_section(command: Any, parser: argparse.ArgumentParser) -> str:
    about = _escaped(command.help)
    parts = [f"## `hybrimoe {command.name}`", "", f"{about}.", ""]
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            # The hidden ones are the `--no...` forms of switches.
            if action.help != argparse.SUPPRESS:
                rows.append(_flag_row(action))
        if group.title == "engine":
            parts += ["And every engine setting above.", ""]
        elif rows:
            title = TITLES.get(group.title or "", group.title)
            parts += [f"**{title}**", ""]
            parts.append(_table(("flag", "value", "meaning"), rows))
    return "\n".join(parts)


def _flag_row(action: argparse.Action) -> Row:
    names = _codes(action.option_strings)
    if not names:
        names = f"`{action.metavar}`"
    text = action.help or ""
    meaning = _escaped(text.replace("%%", "%"))
    return names, _value(action), meaning


def _value(action: argparse.Action) -> str:
    if action.choices is not None:
        return _codes(action.choices)
    if not action.option_strings:
        return ""
    return _escaped(str(action.metavar))


def _codes(words: Iterable[Any]) -> str:
    quoted = [f"`{word}`" for word in words]
    return ", ".join(quoted)


def _escaped(text: str) -> str:
    """Text that is no markup inside a table."""
    for character, instead in ESCAPES.items():
        text = text.replace(character, instead)
    return text


def _table(heading: Row, rows: Iterable[Row]) -> str:
    rule = "|" + "---|" * len(heading)
    lines = [_line(heading), rule]
    for row in rows:
        lines.append(_line(row))
    return "\n".join(lines) + "\n"


def _line(cells: Row) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is stale")
    args = parser.parse_args(arguments)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/settings.md is stale: run python scripts/settings_doc.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
