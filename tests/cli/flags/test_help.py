"""`--help` is short, `--help_all` whole: every flag is in one of the two lists, and once."""

from __future__ import annotations

import argparse
import re
from collections import Counter

import pytest

from hybrimoe_plugin.cli import local_chat
from hybrimoe_plugin.cli.main import COMMANDS, Command, find_module, main

SCREENS = 100
"""Lines of two screens."""
COLUMNS = 100


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main(list(argv)) == 0
    return capsys.readouterr().out.splitlines()


def listed(lines: list[str]) -> Counter[str]:
    """The first spelling of each flag that has an entry of its own, without dashes."""
    names = []
    for line in lines:
        found = re.match(r"  (?:-\w, )?--(\w+)", line)
        if found:
            names.append(found[1])
    return Counter(names)


def flags() -> set[str]:
    """Every flag of local_chat that is not hidden, by its first spelling."""
    parser = argparse.ArgumentParser(add_help=False)
    local_chat.add_arguments(parser)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return {action.option_strings[0].lstrip("-") for action in shown}


def test_help_fits_on_two_screens(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "local_chat", "--help")
    assert len(lines) <= 65 < SCREENS
    assert max(map(len, lines)) <= COLUMNS
    assert lines[-1] == "hybrimoe local_chat --help_all shows all flags."


def test_every_flag_is_common_or_not_and_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    general = {"help", "help_all", "verbose"}
    common = listed(shown(capsys, "local_chat", "--help"))
    every = listed(shown(capsys, "local_chat", "--help-all"))
    assert set(common) == {*local_chat.COMMON, *general}
    assert set(every) == flags() | general
    assert set(common.values()) == set(every.values()) == {1}
    rest = set(every) - set(common)
    assert set(common) | rest == flags() | general and not set(common) & rest
    assert {"optimize_config_path", "cpu_infer", "use_cuda_graph", "mode", "dense"} <= rest
    # Two flags of one meaning would compete.
    assert {"accelerator", "do_sample"} <= rest


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_of_every_command_is_short_and_narrow(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, command, "--help")
    assert len(lines) <= SCREENS
    assert max(map(len, lines)) <= COLUMNS
    about = lines[lines.index("") + 1]
    assert about.endswith("."), "after the usage comes what the command does"


VALUES = re.compile(
    r"N|BYTES|SECONDS|FILE|DIR|PATH|MODEL|TEXT|YAML|RULES|DEVICE|KIND|NAME\|FILE|NAME\|GB/s|ORG/REPO|True\|False"
    r"|[\d.]+\.\.[\d.]+"
)
"""What help calls the values of flags."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_names_of_values_say_what_they_are(command: Command) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    find_module(command.module).add_arguments(parser)
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.choices or action.nargs == 0:
            continue
        assert isinstance(action.metavar, str) and VALUES.fullmatch(action.metavar), action


@pytest.mark.parametrize("command", ["", *(command.name for command in COMMANDS)])
def test_help_reads_well_on_a_narrow_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, *command.split(), "--help")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("explain", "[RULES] [flags]"),
        ("flash_pack", "--output DIR [flags]"),
        ("doctor", "[flags]"),
        ("serve", "[MODEL] [flags]"),
        ("local_chat", "[--gguf_path PATH] [--prompt TEXT] [flags]"),
    ],
)
def test_usage_shows_what_must_be_given(
    command: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys, command, "--help")[0] == f"usage: hybrimoe {command} {usage}"
