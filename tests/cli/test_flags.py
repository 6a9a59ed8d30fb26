"""Flags as kTransformers' users type them, and one per engine setting."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from hybrimoe_plugin.cli.flags import add_settings, add_switch, given_settings, underscored
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


def settings(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    return given_settings(parser.parse_args(argv))


def test_every_setting_has_a_flag_with_help() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    text = parser.format_help()
    for item in fields(Settings):
        assert f"--{item.name} " in text
        assert item.metadata["help"].split()[0] in text


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
