"""What the user types: one line, several between fences, prompt files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrimoe_plugin.cli.reading import is_file, read_message, read_prompt_file
from hybrimoe_plugin.errors import ConfigError


def typed(*lines: str) -> Callable[[str], str]:
    rest = list(lines)

    def read(_prompt: str) -> str:
        if not rest:
            raise EOFError
        return rest.pop(0)

    return read


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""all at once"""'], "all at once"),
        (['"""', '"""'], ""),
        (['"""cut', "off"], "cut\noff"),
        ([""], ""),
    ],
)
def test_message(lines: list[str], message: str) -> None:
    assert read_message(typed(*lines)) == message


def test_end_of_input_is_passed_on() -> None:
    with pytest.raises(EOFError):
        read_message(typed())


def test_prompt_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("grüß\ndich", encoding="utf-8")
    assert read_prompt_file(path) == "grüß\ndich"


def test_only_names_of_files_are_files(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("x")
    assert is_file(str(path))
    assert not any(map(is_file, ["hello there", "", "a\0b", str(tmp_path), "x" * 10_000]))


@pytest.mark.parametrize("raw", [None, b"", b" \n", b"\xff\xfe"])
def test_unusable_prompt_file_is_refused(tmp_path: Path, raw: bytes | None) -> None:
    path = tmp_path / "prompt.txt"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ConfigError, match="prompt"):
        read_prompt_file(path)


def test_prompt_files_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_prompt_file(path) == "one\ntwo\n"
    path.write_bytes("one".encode("utf-16"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_prompt_file(path)


def test_prompt_files_without_an_end_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(
            ConfigError, match="cannot read the prompt file: (.*not a regular file|Is a directory)"
        ):
            read_prompt_file(path)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ConfigError, match="larger than the 16 MiB"):
        read_prompt_file(tmp_path / "huge")
