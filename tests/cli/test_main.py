"""The `hybrimoe` command: exit codes, one-line errors, and a start without importing torch."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import hybrimoe_plugin
from hybrimoe_plugin.cli.console import LogLines, notice
from hybrimoe_plugin.cli.main import COMMANDS, FLASH_CHAT, Command, main
from hybrimoe_plugin.errors import WeightsError


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a made-up command whose body is given."""

    def run_command(body: Callable[[argparse.Namespace], int], *argv: str) -> int:
        module = ModuleType("made_up_command")
        vars(module)["add_arguments"] = lambda parser: parser.add_argument("--some_flag")
        vars(module)["run"] = body
        monkeypatch.setitem(sys.modules, "made_up_command", module)
        return main(["made-up", *argv], (Command("made-up", "a test", "made_up_command"),))

    return run_command


def _raise(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def body(_args: argparse.Namespace) -> int:
        raise error

    return body


def test_own_errors_are_one_line_and_exit_2(
    run_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(_raise(WeightsError("a.gguf:\n not GGUF"))) == 2
    assert capsys.readouterr().err == "hybrimoe: error: a.gguf: not GGUF\n"


def test_system_errors_name_the_file(
    run_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(_raise(FileNotFoundError(2, "No such file or directory", "t.json"))) == 2
    assert capsys.readouterr().err == "hybrimoe: error: t.json: No such file or directory\n"


def test_what_nobody_foresaw_is_one_line_that_says_where(
    run_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(_raise(ZeroDivisionError("by zero"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("hybrimoe: error: unexpected ZeroDivisionError: by zero (test_main.py:")
    assert err.count("\n") == 1


def test_interrupt_exits_130_with_a_clean_message(
    run_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(_raise(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nhybrimoe: interrupted\n"


def test_code_of_the_command_is_returned(run_with: Callable[..., int]) -> None:
    assert run_with(lambda _args: 7) == 7


@pytest.mark.parametrize("name", ["lever-train", "local_chat"])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("lever_ext", "lever_ext.cli", "lever_ext.cli.lever_train", FLASH_CHAT):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without("lever_ext"), *sys.meta_path])
    assert main([name, "--help"]) == 2
    err = capsys.readouterr().err
    assert "needs the package lever_ext, which is not installed" in err and err.count("\n") == 1


class _Without:
    """Finds every module but those of one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


@pytest.mark.parametrize("flag", ["--some-flag", "--some_flag"])
def test_flags_are_spelt_with_either_dash(run_with: Callable[..., int], flag: str) -> None:
    seen: list[str] = []
    assert run_with(lambda args: seen.append(args.some_flag) or 0, f"{flag}=a-b-c") == 0
    assert seen == ["a-b-c"]


@pytest.mark.parametrize(
    "argv", [["nonsense"], ["explain", "--nonsense"], ["local_chat", "--max_new_tokens", "0"]]
)
def test_wrong_arguments_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "usage: hybrimoe" in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(command.name in out for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybrimoe {hybrimoe_plugin.__version__}\n"


def test_names_of_commands_are_listed_alike_and_work_with_either_dash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not [command.name for command in COMMANDS if "-" in command.name]
    assert main(["local-chat", "--help"]) == main(["demo_model", "--help"]) == 0
    assert main(["demo-model", "--help"]) == 0
    assert "--prompt" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["help", "flash-pack"], ["-v", "help", "flash_pack"]])
def test_help_is_a_command_too(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == main(["flash_pack", "--help"]) == 0
    out = capsys.readouterr().out
    half = len(out) // 2
    assert out[:half] == out[half:]
    assert main(["help"]) == 0
    assert "usage: hybrimoe COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["-v"], ["--verbose"], []])
@pytest.mark.parametrize("after", [["-v"], ["--verbose"], []])
def test_verbose_works_on_either_side_of_the_command(argv: list[str], after: list[str]) -> None:
    seen: list[bool] = []
    module = ModuleType("made_up_command")
    vars(module)["add_arguments"] = lambda parser: None
    vars(module)["run"] = lambda args: seen.append(args.verbose) or 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "made_up_command", module)
        commands = (Command("made_up", "a test", "made_up_command"),)
        assert main([*argv, "made_up", *after], commands) == 0
    assert seen == [bool(argv or after)]


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("local_chta", "there is no command 'local_chta'; did you mean local_chat?"),
        ("flash-pcak", "there is no command 'flash-pcak'; did you mean flash_pack?"),
        ("help me", "there is no command 'me' (hybrimoe --help lists them)"),
        ("--gguf_path f.gguf", "flags come after a command, as in hybrimoe local_chat --gguf_path"),
        ("--prompt=hi", "flags come after a command, as in hybrimoe local_chat --prompt ..."),
        ("local_chat --cache_ration 0.5", "no flag --cache_ration; did you mean --cache_ratio?"),
        ("local_chat --cach-bytes=1", "no flag --cach_bytes; did you mean --cache_bytes?"),
        ("local_chat -greedy", "no flag -greedy; did you mean --greedy?"),
        ("local_chat --model f.gguf", "no flag --model; did you mean --gguf_path?"),
        ("local_chat -p hi", "no flag -p; did you mean --prompt?"),
        ("local_chat --xyzzy", "no flag --xyzzy (hybrimoe local_chat --help)"),
        ("local_chat f.gguf", "'f.gguf' belongs to no flag; did you mean --gguf_path 'f.gguf'?"),
        ("local_chat word", "'word' belongs to no flag (hybrimoe local_chat --help)"),
        ("local_chat --scheduler statik", "found 'statik'; did you mean static?"),
        ("local_chat --tree chian", "found 'chian'; did you mean chain?"),
        ("flash_pack --outptu d", "--output"),
        ("calibrate --cpu_thraeds 2", "did you mean --cpu_threads?"),
        ("doctor --jsn", "did you mean --json?"),
    ],
)
def test_what_is_misspelt_is_suggested(
    typed: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("hybrimoe: error: ") and err.count("\n") == 1
    assert found in err


def test_starting_and_importing_load_no_torch() -> None:
    code = (
        "import sys, hybrimoe_plugin\n"
        "from hybrimoe_plugin.cli.main import main\n"
        "from hybrimoe_plugin.injection.rules import parse_rules\n"
        "assert main(['local_chat', '--help']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports at start'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CHATTY = """
import sys, time, types
from hybrimoe_plugin.cli.main import Command, main
module = types.ModuleType("chatty")
module.add_arguments = lambda parser: None
module.run = lambda args: print("x" * 100) or 0
sys.modules["chatty"] = module
time.sleep(0.2)
sys.exit(main(["chatty"], [Command("chatty", "talks", "chatty")]))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_is_quiet(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    script = '"$0" -c "$1" | true; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, CHATTY], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


SPEAKING = """
import sys, types
from hybrimoe_plugin.cli.main import Command, main
module = types.ModuleType("speaking")
module.add_arguments = lambda parser: None
def run(args):
    print("Antwort: \\u00fc", input().encode("utf-8", "surrogateescape"))
    print("\\u4f60", file=sys.stderr)
    return 0
module.run = run
sys.modules["speaking"] = module
sys.exit(main(["speaking"], [Command("speaking", "talks", "speaking")]))
"""


def test_terminals_that_know_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be shown is replaced, and what is no text is read all the same."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    done = subprocess.run([sys.executable, "-c", SPEAKING], input=b"gr\xfc\n", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"Antwort: ? b'gr\\xfc'\n"
    assert done.stderr == b"\\u4f60\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such"],
        ["--cache_bytes", "4X"],
        ["--max_new_tokens", "0"],
        ["--cache_ratio"],
        ["--seed", "x"],
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local_chat", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hybrimoe: error: ") and err.count("\n") == 1
    assert flags[0] in err and "--help" in err


IMPORTING = """
import os, signal, sys, time
class Finder:
    def find_spec(self, name, *_):
        if name == "hybrimoe_plugin.hosts.transformers.load":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                os.abort()  # what a library in C++ does with it
sys.meta_path.insert(0, Finder())
from hybrimoe_plugin.cli.main import main
main(["explain", "--gguf_path", "none.gguf"])
"""


def test_interrupts_while_libraries_are_imported_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nhybrimoe: interrupted\n")


def test_closed_streams_are_no_traceback() -> None:
    script = '"$@" local_chat --gguf_path none.gguf <&-; echo $?; "$@" --version >&-'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "hybrimoe_plugin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "2\n"
    closed = (
        "hybrimoe: error: standard input is closed, so there is nothing to talk with: give "
        "--prompt\n"
    )
    assert done.stderr.removeprefix(closed) in ("", f"hybrimoe {hybrimoe_plugin.__version__}\n")


def test_nothing_is_fetched(run_with: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen: list[str | None] = []
    run_with(lambda _args: seen.append(os.environ.get("HF_HUB_OFFLINE")) or 0)
    assert seen == ["1"]


def test_ctrl_c_is_ignored_once_the_command_has_ended() -> None:
    """Python is ended by a signal, or with a traceback, while it takes itself down."""
    code = (
        "import os, signal; from hybrimoe_plugin.cli.main import main; found = main(); "
        "os.kill(os.getpid(), signal.SIGINT); raise SystemExit(found)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_terminal_would_obey_is_only_shown(
    run_with: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def say(_args: argparse.Namespace) -> int:
        notice("a \x1b[2J file")
        record = logging.LogRecord("", logging.WARNING, "", 0, "%s", ("b\x1b",), None)
        print(LogLines("%(message)s").format(record), file=sys.stderr)
        raise WeightsError("c\x1b]0;title\x07 \u202e")

    assert run_with(say) == 2
    assert capsys.readouterr().err.splitlines() == [
        r"hybrimoe: a \x1b[2J file",
        r"b\x1b",
        r"hybrimoe: error: c\x1b]0;title\x07 \u202e",
    ]


def test_notices_do_not_go_into_the_answer_where_stderr_is_closed() -> None:
    script = '"$@" no_such_command 2>&-; echo $?'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "hybrimoe_plugin"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n", "")
