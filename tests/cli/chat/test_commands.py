"""Commands of a conversation: what they change, what they refuse, and that nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from scripted_chat import Model, converse

from hybrimoe_plugin.cli.chat.typed import saved
from hybrimoe_plugin.cli.chat.typed.commands import COMMANDS, found, message_in
from hybrimoe_plugin.cli.chat.typed.terminal import Commands
from hybrimoe_plugin.errors import ConfigError

Capture = pytest.CaptureFixture[str]


def test_help_and_completion_come_from_the_table(capsys: Capture) -> None:
    converse(Model(), "/help")
    shown = capsys.readouterr().err
    for command in COMMANDS:
        assert f"/{command.name}" in shown and command.help in shown

    def completed(text: str) -> list[str]:
        return [each.text for each in Commands().get_completions(Document(text), CompleteEvent())]

    assert completed("/") == [f"/{command.name}" for command in COMMANDS]
    assert completed("/set te") == ["temperature"]
    assert completed("plain text") == completed("a\n/") == []


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("/home/x is a file", "/home/x is a file"),
        ("/", "/"),
        ("// a comment", "// a comment"),
        ("/2 of it", "/2 of it"),
        ("say /clear", "say /clear"),
        ("//clear the table", "/clear the table"),
        ("//etc\nmore", "/etc\nmore"),
    ],
)
def test_what_is_no_command_is_sent(typed: str, sent: str) -> None:
    assert found(typed) is None
    assert message_in(typed) == sent


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/sav x", "did you mean /save?"),
        ("/xyzzy", "no command /xyzzy (/help"),
        ("/Retry", "did you mean /retry?"),
        ("/clear x", "/clear takes nothing behind it, found 'x'"),
        ("/exit now", "/exit takes nothing behind it"),
    ],
)
def test_unknown_commands_are_not_sent(typed: str, said: str, capsys: Capture) -> None:
    model = Model("never")
    converse(model, typed)
    assert said in capsys.readouterr().err
    assert model.prompts == []


def test_commands_before_a_message_lose_none_of_its_lines(capsys: Capture) -> None:
    model = Model("a", "b")
    converse(model, "/set seed 3\n/stats\nfirst line\n/second line", '/system """\nkept whole')
    assert model.prompts == ["<u>first line\n/second line<a>"]
    err = capsys.readouterr().err
    assert "seed: 3" in err and "context:" in err and "kept whole" in err


def test_nothing_is_sent_behind_a_command_that_leaves() -> None:
    model = Model("never")
    converse(model, "/exit\nmore")
    assert model.prompts == []


def test_names_of_other_chats_and_bare_exit(capsys: Capture) -> None:
    model = Model("a", "b")
    converse(model, "hello", "/regenerate", "/?", "/set temperature", "exit", "/bye", "never read")
    assert len(model.prompts) == 2
    err = capsys.readouterr().err
    assert "show this" in err and "'exit' was not sent" in err
    assert "temperature: as the model's generation config says" in err


def test_a_file_that_is_sent_is_named(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "question.txt"
    path.write_text("Why?")
    model = Model("a")
    converse(model, str(path), flags=["--noquiet"])
    assert model.prompts == ["<u>Why?<a>"]
    assert f"sending the text of {path}: 4 characters" in capsys.readouterr().err


def test_system_prompt(capsys: Capture) -> None:
    model = Model("a", "b", "c")
    converse(model, "x", "/system Be brief.", "y", "/system", '/system ""', "z")
    assert model.prompts[1] == "<s>Be brief.<u>x<a>a<u>y<a>"
    assert model.prompts[2].startswith("<u>x")
    err = capsys.readouterr().err
    assert err.count("system prompt: Be brief.") == 2 and "there is no system prompt" in err


def test_quotes_within_a_system_prompt_are_its_own() -> None:
    assert converse(Model(), '/system "S"', '/system "').chat.system == '"'
    assert converse(Model(), '/system "a" and "b"').chat.system == '"a" and "b"'


def test_retry_takes_the_answer_back_only_for_another(capsys: Capture) -> None:
    model = Model("a", "b")
    made = converse(model, "/retry", "x", "/retry", "/retry")
    assert model.prompts == ["<u>x<a>"] * 3
    assert [each["content"] for each in made.chat.messages] == ["x", "b"]
    err = capsys.readouterr().err
    assert "there is no answer yet" in err and "could not be computed" in err


def test_set_reads_values_as_flags_do(capsys: Capture) -> None:
    made = converse(
        Model(),
        "/set greedy",
        "/set greedy on",
        "/set top-k 5",
        "/set temperature 0.5",
        "/set repetition_penalty 1.2",
        "/set stop END OF IT",
        "/set max_new_tokens 7",
        "/set seed 3",
    )
    options = made.chat.options
    assert options.sampling == {
        "temperature": 0.5,
        "top_k": 5,
        "do_sample": True,
        "repetition_penalty": 1.2,
    }
    assert (options.stops, options.max_new_tokens) == (("END OF IT",), 7)
    assert "top_k: 5; greedy: False" in capsys.readouterr().err

    made = converse(Model(), "/set stop x", "/set stop", "/set top_p 0.3", "/set greedy on")
    assert made.chat.options.stops == ()
    assert made.chat.options.sampling is not None
    assert made.chat.options.sampling["do_sample"] is False


@pytest.mark.parametrize(
    ("typed", "sampling"),
    [
        (("temperature 0", "top_p 0.5"), {"top_p": 0.5, "do_sample": True}),
        (("temperature 0", "do_sample True"), {"do_sample": True}),
        (("temperature 0", "greedy False"), {}),
        (("do_sample False", "greedy False"), {}),
        (("temperature 0", "temperature default"), {}),
        (("top_k 5", "top_k default", "do_sample default"), {}),
    ],
)
def test_what_was_set_last_counts(typed: tuple[str, ...], sampling: dict[str, Any]) -> None:
    made = converse(Model(), *(f"/set {each}" for each in typed))
    assert made.chat.options.sampling == sampling


def test_a_setting_can_be_taken_back() -> None:
    made = converse(Model(), *(f"/set {name} default" for name in ("seed", "force_think", "stop")))
    assert (made.args.seed, made.args.force_think, made.args.stop) == (None, False, ["default"])
    made = converse(Model(), "/set greedy on", "/set top_p default", "/set max_new_tokens default")
    assert made.args.greedy is True and made.args.max_new_tokens == 300


@pytest.mark.parametrize(
    ("typed", "stops"),
    [
        (r"\n", ("\n",)),
        (r"a\\n", (r"a\n",)),
        ('"END "', ("END ",)),
        ('a "b"', ('a "b"',)),
        ('""', ()),
    ],
)
def test_stop_strings_are_quoted_and_escaped(typed: str, stops: tuple[str, ...]) -> None:
    made = converse(Model(), "/set stop before", f"/set stop {typed}")
    assert made.chat.options.stops == stops


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/set temperature hot", "/set temperature: expected a number from 0 to 100, found 'hot'"),
        ("/set tempreture 1", "no setting tempreture; did you mean temperature?"),
        ("/set chat 1", "no setting chat"),
        ("/set max_new_tokens 0", "expected a whole number"),
        ("/set seed -1", "from 0 to"),
        ("/set stop \udcff", r"/set stop: expected UTF-8 text, found '\udcff'"),
        ("/set max_new_tokens 1000", "answers may have 1000 tokens, and the model's context has"),
    ],
)
def test_set_refuses_and_changes_nothing(typed: str, said: str, capsys: Capture) -> None:
    made = converse(Model(), typed)
    assert said in capsys.readouterr().err
    assert made.chat.options.sampling == {} and made.chat.options.max_new_tokens == 300


def test_stats_show_the_context_used(capsys: Capture) -> None:
    converse(Model("a", context=500), "/stats", "x", "/stats")
    err = capsys.readouterr().err
    assert "context:              0 of 500 token(s)" in err
    assert "context:              9 of 500 token(s)" in err
    assert "eval count:           1 token(s)" in err


def test_the_context_used_is_not_known_after_load(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "talk.json"
    saved.save(path, "", [USER, ANSWER])
    made = converse(Model(), "/system S", f"/load {path}", "/stats", "/clear", "/stats")
    err = capsys.readouterr().err
    assert "are the conversation now; they have no system prompt, so there is none now" in err
    assert "context:              not known before the next answer; of 1000 token(s)" in err
    assert "context:              0 of 1000 token(s)" in err
    assert made.chat.system == ""


def test_saved_conversations_go_on(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "talk.json"
    converse(Model("ä"), "/system S", "x", f"/save {path}", f"/save {path}")
    assert path.stat().st_mode & 0o077 == 0
    model = Model("z")
    converse(model, f"/load {path}", "y")
    assert model.prompts == ["<s>S<u>x<a>ä<u>y<a>"]
    assert "1 turn(s)" in capsys.readouterr().err


def test_what_is_no_conversation_is_not_overwritten(tmp_path: Path, capsys: Capture) -> None:
    other, folder, pipe = tmp_path / "notes", tmp_path / "folder", tmp_path / "pipe"
    other.write_text("mine")
    folder.mkdir()
    os.mkfifo(pipe)
    names = [other, folder, pipe, tmp_path / "no" / "such", "", "x\0y", tmp_path / ("x" * 300)]
    converse(Model("a"), "x", *(f"/save {name}" for name in names))
    assert capsys.readouterr().err.count("error: /save: ") == len(names)
    assert other.read_text() == "mine" and sorted(tmp_path.iterdir()) == [folder, other, pipe]


def test_replacing_keeps_links_permissions_and_fields(tmp_path: Path, capsys: Capture) -> None:
    path, link, other = tmp_path / "talk.json", tmp_path / "link", tmp_path / "other"
    saved.save(path, "", [USER, ANSWER])
    path.chmod(0o664)
    link.symlink_to(path)
    converse(Model("two"), "one", f"/save {link}")
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o664
    assert saved.load(path)[1][0]["content"] == "one"

    for content in (
        {"messages": [USER, ANSWER], "model": "m"},
        {"messages": [USER, {**ANSWER, "id": 1}]},
    ):
        other.write_text(json.dumps(content))
        saved.load(other)
        converse(Model("two"), "one", f"/save {other}")
        assert json.loads(other.read_text()) == content
        assert "exists and is not replaced" in capsys.readouterr().err


def test_long_names_are_saved(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125)
    saved.save(path, "", [USER, ANSWER])
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_would_take_too_much_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(saved.MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than the 16 MiB"):
        saved.load(path)


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        ([USER, ANSWER], "no saved conversation"),
        ({"messages": {}}, "no saved conversation"),
        ({"messages": ["x", "y"]}, "message 1 has no role"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has no role"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "no Unicode text"),
        ({"messages": [USER]}, "in turn, found user"),
        ({"messages": [ANSWER, USER]}, "in turn, found assistant, user"),
        ({"messages": [USER, {"role": "system", "content": "s"}]}, "in turn"),
        (None, "No such file"),
    ],
)
def test_hostile_files_are_refused_and_nothing_is_lost(
    content: Any, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ConfigError, match=said):
        saved.load(path)
    model = Model("a", "b")
    converse(model, "one", f"/load {path}", "two")
    assert model.prompts[1] == "<u>one<a>a<u>two<a>"
