"""Flags as kTransformers' users type them, and one per engine setting."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields

import pytest

from hybrimoe_plugin import config
from hybrimoe_plugin.cli.flags import Parser, add_switch, underscored
from hybrimoe_plugin.cli.main import COMMANDS, find_module
from hybrimoe_plugin.cli.setting_flags import EXPERT, OLD, add_settings, given_settings
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.errors import ConfigError


def switch(*argv: str) -> object:
    parser = argparse.ArgumentParser()
    add_switch(parser, "use_it", "a switch", None)
    return parser.parse_args(argv).use_it


@pytest.mark.parametrize(
    "argv", [["--use_it"], ["--use_it", "True"], ["--use_it=true"], ["--use_it=1"]]
)
def test_switch_on(argv: list[str]) -> None:
    assert switch(*argv) is True


@pytest.mark.parametrize(
    "argv", [["--nouse_it"], ["--no_use_it"], ["--use_it", "False"], ["--use_it=off"]]
)
def test_switch_off(argv: list[str]) -> None:
    assert switch(*argv) is False


def test_switch_left_alone_and_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    assert switch() is None
    with pytest.raises(SystemExit):
        switch("--use_it=maybe")
    assert "True or False" in capsys.readouterr().err


def test_dashes_change_in_names_only() -> None:
    argv = ["--a-b", "c-d", "--e-f=g-h", "-v", "--", "--i-j"]
    assert underscored(argv) == ["--a_b", "c-d", "--e_f=g-h", "-v", "--", "--i-j"]


def test_no_flag_for_a_path_takes_the_empty_one() -> None:
    """It would mean the current folder, or be taken for a flag that was left out."""
    for command in COMMANDS:
        parser = Parser(prog=command.name)
        find_module(command.module).add_arguments(parser)
        for action in parser._actions:
            if action.metavar in ("DIR", "FILE", "MODEL", "NAME|FILE", "PATH", "YAML", "RULES"):
                name = action.option_strings[:1]
                with pytest.raises(ConfigError, match="expected a path"):
                    parser.parse_args([*name, ""])


def settings(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    return given_settings(parser.parse_args(argv))


def test_settings_have_flags_with_help_and_those_of_experts_are_hidden() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    text = parser.format_help()
    for item in fields(Settings):
        shown = f"--{item.name} " in text
        assert shown == (item.name not in EXPERT)
        assert not shown or item.metadata["help"].split()[0] in text
    assert not any(f"--{name} " in text for name in OLD)
    assert {"mrs_alpha", "mrs_p", "kernels"} <= set(EXPERT)


@pytest.fixture
def unnoticed() -> Iterator[None]:
    config._notice_once.cache_clear()
    yield
    config._notice_once.cache_clear()


def test_flags_of_expert_settings_are_accepted_with_a_notice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert settings("--mrs_alpha", "0.3", "--kernels", "torch") == {
        "mrs_alpha": 0.3,
        "kernels": "torch",
    }
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("into the rules, or give it to load_model") for line in lines)
    given_settings(argparse.Namespace(mrs_alpha=0.3, quiet=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--linears", "plain"], {"dense": "dequantised"}),
        (["--dense", "lean"], {"dense": "auto"}),
        (["--cuda_graphs", "off", "--cpu_graphs=auto"], {"graphs": "off"}),
    ],
)
def test_old_flags_are_accepted_with_a_notice(
    argv: list[str],
    found: dict[str, str],
    unnoticed: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert settings(*argv) == found
    ((name, value),) = found.items()
    assert f"{name}={value}" in caplog.text


def test_old_and_new_flags_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="cpu_graphs=off and graphs=auto contradict each other"):
        settings("--graphs", "auto", "--cpu_graphs", "off")


def test_only_given_settings_are_returned() -> None:
    assert settings() == {}
    found = settings(
        "--cache_ratio", "0.25", "--scheduler=static", "--cpu_threads", "3", "--mrs_p", "None"
    )
    assert found == {"cache_ratio": 0.25, "scheduler": "static", "cpu_threads": 3, "mrs_p": None}


def test_sizes_are_read() -> None:
    assert settings("--cache_bytes", "2GiB") == {"cache_bytes": 2**31}


def test_range_is_checked() -> None:
    with pytest.raises(ConfigError, match="cache_ratio"):
        settings("--cache_ratio", "1.5")


@pytest.mark.parametrize(
    "argv", [["--cache_ratio", "x"], ["--cache_bytes", "x"], ["--cache", "x"], ["--mrs_p", "1.5"]]
)
def test_misspelt_values_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        settings(*argv)
