"""The conversation at a real pseudo-terminal: editing, pasting, history, Ctrl-C."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from at_terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP, Terminal
from scripted_chat import Model, session

from hybrimoe_plugin.cli.chat import loading, progress
from hybrimoe_plugin.cli.chat.typed import loop, terminal
from hybrimoe_plugin.cli.chat.typed.history import HISTORY, MAX_BYTES, history
from hybrimoe_plugin.cli.main import INTERRUPTED, main
from hybrimoe_plugin.errors import ConfigError

Talk = Any


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Talk]:
    """Begins a conversation whose answers are given; its prompts end up in a file."""
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    begun: list[Terminal] = []

    def begin(*answers: str, delay_s: float | None = None) -> Terminal:
        model = Model(*answers)
        model.delays_s = [] if delay_s is None else [delay_s]

        def run() -> int:
            code = loop.converse(session(model), terminal.editor(), is_editor=True)
            (tmp_path / "prompts").write_text(json.dumps(model.prompts))
            return code

        begun.append(Terminal(run))
        begun[-1].expect("Chat:")
        return begun[-1]

    yield begin
    for each in begun:
        each.close()


def prompts(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "prompts").read_text())
    return found


def test_pasted_lines_are_one_message(talk: Talk, tmp_path: Path) -> None:
    """Bracketed, and from terminals that send them as if they were typed."""
    at = talk("one", "two", "three")
    at.type("\x1b[200~first\rsecond\n\x1b[201~" + ENTER)
    at.expect("one")
    at.expect("Chat:")
    at.type("a\rb\r\rc\r")
    at.expect("two")
    at.expect("Chat:")
    at.type("x" + ALT_ENTER + "y")
    at.expect("y")
    at.type(ENTER)
    at.expect("three")
    at.expect("Chat:")
    at.type(CTRL_D)
    assert at.end()[0] == 0
    said = prompts(tmp_path)
    assert said[0] == "<u>first\nsecond\n<a>"
    assert said[1].endswith("<u>a\nb\n\nc<a>")
    assert said[2].endswith("<u>x\ny<a>")


def test_a_long_paste_is_read_at_once(talk: Talk) -> None:
    """Key by key it would take the test's whole patience."""
    at = talk()
    writer = threading.Thread(target=at.type, args=(("x" * 79 + ENTER) * 1000,))
    writer.start()
    at.expect("the message has 80005 tokens")
    writer.join()
    at.expect("Chat:")
    at.type(CTRL_D)
    assert at.end()[0] == 0


def test_fences_and_history(talk: Talk, tmp_path: Path) -> None:
    at = talk("one", "two")
    at.type('"""')
    at.type(ENTER)
    at.type("a")
    at.type(ENTER)
    at.type('"""')
    at.expect('"""')
    at.type(ENTER)
    at.expect("one")
    at.expect("Chat:")
    at.type("/exit" + ENTER)
    assert at.end()[0] == 0
    assert prompts(tmp_path) == ["<u>a<a>"]

    kept = tmp_path / HISTORY
    assert kept.stat().st_mode & 0o777 == 0o600
    at = talk("again")
    at.type(UP + UP + UP + UP)
    at.expect('"""')
    at.type(CTRL_C)
    at.expect("leaves")
    at.expect("Chat:")
    at.type("\x12" + "a")  # search backwards
    at.expect('"""')
    at.type(ENTER)
    at.type(ENTER)
    at.expect("again")
    at.expect("Chat:")
    at.type(CTRL_D)
    assert at.end()[0] == 0
    assert prompts(tmp_path) == ["<u>a<a>"]


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(talk: Talk, tmp_path: Path) -> None:
    at = talk("one", "two")
    at.type("first" + ENTER)
    at.expect("one")
    at.expect("Chat:")
    at.type("wrong" + CTRL_C)
    at.expect("Ctrl-C again or Ctrl-D leaves")
    at.expect("Chat:")
    at.type("right" + ENTER)
    at.expect("two")
    at.expect("Chat:")
    at.type(CTRL_C)
    at.expect("leaves")
    at.expect("Chat:")
    at.type(CTRL_C)
    code, rest = at.end()
    assert code == INTERRUPTED and "Traceback" not in rest
    assert prompts(tmp_path)[1] == "<u>first<a>one<u>right<a>"


def test_ctrl_c_in_an_answer_keeps_what_was_said(talk: Talk, tmp_path: Path) -> None:
    at = talk("abcdefghijklmnopqrstuvwxyz" * 9, "next", delay_s=0.02)
    at.type("go" + ENTER)
    at.expect("abc")
    at.type(CTRL_C + CTRL_C)  # the second one right after the first
    at.expect("Chat:")
    at.type("on" + ENTER)
    at.expect("next")
    at.expect("Chat:")
    at.type("/retry" + ENTER)  # there is no third answer: an error, and the conversation goes on
    at.expect("could not be computed")
    at.expect("Chat:")
    at.type(CTRL_D)
    code, rest = at.end()
    assert code == 0 and "Traceback" not in rest
    assert prompts(tmp_path)[1].startswith("<u>go<a>abc")
    assert prompts(tmp_path)[1].endswith("<u>on<a>")


def test_ctrl_c_before_the_first_token_forgets_the_question(talk: Talk, tmp_path: Path) -> None:
    at = talk("late", "next", delay_s=20.0)
    at.type("go" + ENTER)
    at.expect("computing")
    at.type(CTRL_C + CTRL_C + CTRL_C)
    at.expect("stopped")
    at.expect("Chat:")
    at.type("on" + ENTER)
    at.expect("next")
    at.expect("Chat:")
    at.type(CTRL_D)
    assert at.end()[0] == 0
    assert prompts(tmp_path)[1] == "<u>on<a>"


def test_commands_are_completed_and_unknown_ones_not_sent(talk: Talk, tmp_path: Path) -> None:
    at = talk("one")
    at.type("hi" + ENTER)
    at.expect("one")
    at.expect("Chat:")
    at.type("/savve x" + ENTER)
    at.expect("did you mean /save?")
    at.expect("Chat:")
    path = tmp_path / "talk.json"
    at.type(f"/sav\t {path}" + ENTER)
    at.expect("saved as")
    at.expect("Chat:")
    at.type(CTRL_D)
    assert at.end()[0] == 0
    assert [each["content"] for each in json.loads(path.read_text())["messages"]] == ["hi", "one"]
    assert len(prompts(tmp_path)) == 1


def test_waiting_is_explained_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY_S", 0.0)

    def import_nothing() -> None:
        with progress.prompt_bar(2048, True) as bar:
            bar.update(512)
            bar.refresh()
        raise ConfigError("the end")

    monkeypatch.setattr(loading, "import_libraries", import_nothing)
    at = Terminal(lambda: main(["local_chat", "--prompt", "hi"]))
    at.expect("hybrimoe: loading the demo model ...")
    at.expect("512/2048")
    assert "error: the end" in at.end()[1]

    at = Terminal(lambda: main(["local_chat", "--prompt", "hi", "--quiet"]))
    assert "loading" not in at.end()[1]


def test_a_history_that_cannot_be_written_is_in_memory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / HISTORY)
    other = tmp_path / "a file"
    other.write_text("")
    for folder in (tmp_path, other):
        kept = history(folder)
        kept.append_string("typed")
        assert kept.get_strings() == ["typed"]
    kept = history(tmp_path / "new")
    kept.append_string("no text: \udcfc")
    (tmp_path / "new").chmod(0o700)
    assert kept.get_strings() == ["no text: \udcfc"]


def test_a_history_that_was_removed_is_private_again(tmp_path: Path) -> None:
    kept, path = history(tmp_path), tmp_path / HISTORY
    path.unlink()
    before = os.umask(0)
    try:
        kept.append_string("a\nb")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    kept.append_string("c")
    assert not (tmp_path / "elsewhere").exists()


def test_only_the_end_of_a_long_history_is_read(tmp_path: Path) -> None:
    path = tmp_path / HISTORY
    path.write_text("\n# then\n+" + "x" * MAX_BYTES + "\n")
    kept = history(tmp_path)
    for text in ("a\n# b", "", "grüß"):
        kept.append_string(text)
    assert list(history(tmp_path).load_history_strings()) == ["grüß", "", "a\n# b"]
