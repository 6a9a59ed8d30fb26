"""The start of a command that loads a model: what is said first, and what imports leave behind."""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys

import pytest

from hybrimoe_plugin.cli import imports
from hybrimoe_plugin.cli.chat import loading
from hybrimoe_plugin.cli.serve import libraries

FIRST = """
import sys
from hybrimoe_plugin.cli.chat import loading
from hybrimoe_plugin.cli.main import main

HEAVY = {"torch", "transformers", "numpy", "fastapi", "uvicorn", "prompt_toolkit", "rich"}

def said(text):
    print(text, sorted(HEAVY & set(sys.modules)))
    sys.exit(0)

loading.is_watched = lambda args: True
loading.notice = said
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["local_chat", "serve"])
def test_a_line_is_shown_before_anything_large_is_imported(command: str) -> None:
    if command == "serve" and libraries.missing():
        pytest.skip("the server's libraries are not installed")
    words = [sys.executable, "-c", FIRST, command, "--demo"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "loading the demo model ... []\n", done.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({}, "loading the demo model ..."),
        ({"gguf_path": "models/a.gguf"}, "loading a.gguf ..."),
        ({"gguf_path": "models/a.gguf", "model_path": "models/b"}, "loading a.gguf ..."),
        ({"model_path": "models/b/"}, "loading b ..."),
        ({"flash_pack": "packs/c"}, "loading c ..."),
        ({"gguf_path": "kept/3f.gguf", "hub_name": "owner/d:Q4_K_M"}, "loading owner/d:Q4_K_M ..."),
    ],
)
def test_the_line_names_what_the_flags_name(
    flags: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loading, "is_watched", lambda _args: True)
    monkeypatch.setattr(loading, "notice", said.append)
    nothing = dict.fromkeys(("flash_pack", "gguf_path", "model_path"))
    loading.announce(argparse.Namespace(**{**nothing, **flags}))
    assert said == [line]


def test_nothing_is_said_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(quiet=False, flash_pack=None, gguf_path=None, model_path=None)
    loading.announce(args)  # pytest's stderr is no terminal
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("was_on", [True, False])
def test_collections_go_on_as_before_also_after_an_error(was_on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ImportError), imports._no_collections():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == was_on
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()
