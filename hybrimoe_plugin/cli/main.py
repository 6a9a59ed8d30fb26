"""Entry point of the `hybrimoe` command: finds the sub-command, reports errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hybrimoe_plugin import __version__
from hybrimoe_plugin.cli.console import LogLines
from hybrimoe_plugin.cli.flags import Parser, underscored
from hybrimoe_plugin.cli.hub.names import resolve
from hybrimoe_plugin.errors import ConfigError, HybriMoEError, did_you_mean
from hybrimoe_plugin.files import one_line

log = logging.getLogger(__name__)

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
"""128 + the number of SIGPIPE, as shells report it."""


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Its module has `add_arguments(parser)` and `run(args) -> exit code`. It may have `COMMON`, the
    names of the flags that `--help` shows where there are more than most people need.
    """

    name: str
    help: str
    module: str
    online: bool = False
    """Whether it may reach the Hugging Face hub."""


COMMANDS = (
    Command(
        "local_chat",
        "chat with a model; without one, with a small demo model",
        "hybrimoe_plugin.cli.local_chat",
    ),
    Command(
        "serve",
        "serve a model to the clients of the OpenAI and Anthropic APIs",
        "hybrimoe_plugin.cli.serve.command",
    ),
    Command(
        "explain",
        "show which module each rule replaces, without loading weights",
        "hybrimoe_plugin.cli.explain",
    ),
    Command(
        "calibrate", "measure this machine for a model's experts", "hybrimoe_plugin.cli.calibrate"
    ),
    Command(
        "demo_model", "build the demo model and print its path", "hybrimoe_plugin.cli.demo_model"
    ),
    Command(
        "pull",
        "fetch a model from the Hugging Face hub and print its path",
        "hybrimoe_plugin.cli.hub.pull",
        online=True,
    ),
    Command(
        "convert",
        "write a quantised checkpoint (FP8, MXFP4, 4-bit integers) as a GGUF file",
        "hybrimoe_plugin.cli.convert",
    ),
    Command("flash_pack", "pack a model for direct reads from flash", "lever_ext.cli.flash_pack"),
    Command(
        "lever_train",
        "train the early-exit predictor of a packed model",
        "lever_ext.cli.lever_train",
    ),
    Command(
        "doctor",
        "show what is installed, which backends work and what fits into memory",
        "hybrimoe_plugin.cli.doctor",
    ),
    Command(
        "cache", "list what is kept on disk between runs, or remove it", "hybrimoe_plugin.cli.cache"
    ),
    Command(
        "ktransformers_chat",
        "chat with the original ktransformers.local_chat, patched",
        "hybrimoe_plugin.cli.ktransformers.chat",
    ),
    Command(
        "install_ktransformers",
        "install ktransformers without a compiler",
        "hybrimoe_plugin.cli.ktransformers.install",
    ),
    Command(
        "translate_rules",
        "write kTransformers' rules of versions 0.2 to 0.4 for local_chat",
        "hybrimoe_plugin.cli.ktransformers.translate",
    ),
    Command(
        "patches",
        "list the patches that ktransformers needs here",
        "hybrimoe_plugin.cli.ktransformers.patches",
    ),
)

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

_OWN_FLAGS = ("-h", "--help", "--version", "-v", "--verbose")
"""What may come before a command."""

FLASH_CHAT = "lever_ext.cli.chat"
"""The part of `local_chat` for targets on flash. Its module has `add_arguments(parser)`,
`is_selected(args)` and `load(args)`.
"""


def find_module(path: str) -> ModuleType:
    """Import a module of the command line by its name.

    Raises:
        ConfigError: the package that holds it is not installed.
    """
    package = path.partition(".")[0]
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(
            f"this needs the package {package}, which is not installed: install "
            f"ktransformers-hybrimoe again, which contains it"
        ) from None


@contextlib.contextmanager
def _log_levels() -> Iterator[None]:
    """What -v or --quiet change ends with the command, for programs that call `main`."""
    loggers = [logging.getLogger(name) for name in ("hybrimoe_plugin", "lever_ext")]
    before = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@_log_levels()
def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default: the process's.
        commands: the table of sub-commands.

    Returns:
        the exit code: 0 done, 2 bad input, 130 interrupted, 141 the reader closed the output.
    """
    if sys.stderr is None:
        # The shell closed it (`2>&-`). `print` would take stdout in its place.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    _tolerant_streams()
    try:
        try:
            return _dispatch(list(sys.argv[1:] if argv is None else argv), commands)
        except SystemExit as stop:
            # argparse exits after --help and --version.
            return stop.code if isinstance(stop.code, int) else 0
        finally:
            # Not at exit, where a closed pipe could no longer be handled.
            if sys.stdout is not None:
                sys.stdout.flush()
    except HybriMoEError as error:
        log.info("in detail", exc_info=error)
        return _complain(str(error))
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("\nhybrimoe: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # A bug here, or an error of a library that nobody foresaw.
        log.info("in detail", exc_info=error)
        kind = type(error).__name__
        place = _place(error)
        return _complain(f"unexpected {kind}: {error} ({place}; -v shows more)")
    finally:
        if argv is None:
            # The process ends: one more Ctrl-C must not make it end with a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _dispatch(argv: list[str], commands: Sequence[Command]) -> int:
    shown = logging.StreamHandler()
    shown.setFormatter(LogLines("hybrimoe: %(message)s"))
    logging.basicConfig(handlers=[shown], level=logging.WARNING)
    parser = Parser(
        prog="hybrimoe",
        usage="%(prog)s COMMAND [flags]",
        description=_DESCRIPTION,
        epilog="hybrimoe help COMMAND shows the flags of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hybrimoe {__version__}")
    _add_verbose(parser, False)
    table = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", prog="hybrimoe"
    )
    argv, chosen = _find_command(argv, commands)
    may_fetch = not any(os.environ.get(name) for name in _OFFLINE)
    if chosen is None or not chosen.online:
        _keep_off_hubs()
    module = None
    for command in commands:
        about = f"{_capitalised(command.help)}."
        sub = table.add_parser(
            command.name, help=command.help, description=about, allow_abbrev=False
        )
        if command is chosen:
            # Only the chosen module is imported: some import rich, and torch when they run.
            module = find_module(command.module)
            _add_arguments(sub, module)
    args = parser.parse_args(underscored(argv))
    if module is None:
        parser.print_help()
        return BAD_INPUT if argv else 0
    if args.verbose:
        logging.getLogger("hybrimoe_plugin").setLevel(logging.INFO)
    resolve(args, may_fetch)
    code: int = module.run(args)
    return code


def _find_command(argv: list[str], commands: Sequence[Command]) -> tuple[list[str], Command | None]:
    """(the arguments with the command's name as the table has it, the command or None).

    `help COMMAND` becomes `COMMAND --help`.

    Raises:
        ConfigError: there is no such command.
    """
    place = next((at for at, word in enumerate(argv) if not word.startswith("-")), len(argv))
    before, after = argv[:place], argv[place + 1 :]
    foreign = [flag for flag in before if flag not in _OWN_FLAGS]
    if foreign:
        flag = foreign[0].partition("=")[0]
        raise ConfigError(
            f"{flag} is no flag of hybrimoe itself: flags come after a command, as in hybrimoe "
            f"local_chat {flag} ... (hybrimoe --help lists the commands)"
        )
    if place == len(argv):
        return argv, None
    word = argv[place]
    if word == "help":
        return _find_command([*before, *after, "--help"], commands)
    for command in commands:
        # Written with either dash.
        if word.replace("-", "_") == command.name.replace("-", "_"):
            return [*before, command.name, *after], command
    names = [command.name for command in commands]
    raise ConfigError(
        f"there is no command {word!r}{did_you_mean(word, names)} (hybrimoe --help lists them)"
    )


def _add_arguments(parser: Parser, module: Any) -> None:
    # No default: it would take the place of what was given before the command.
    _add_verbose(parser, argparse.SUPPRESS)
    common = getattr(module, "COMMON", None)
    if common is not None:
        parser.shorten_help(common)
    module.add_arguments(parser)
    if parser.usage is None:
        parser.shorten_usage()


def _add_verbose(parser: Parser, default: Any) -> None:
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=default, help="print more details"
    )


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


_DESCRIPTION = (
    "Chat with or serve mixture-of-experts models that are larger than the GPU's memory: each "
    "layer's work is shared between GPU and CPU."
)


def _tolerant_streams() -> None:
    """Replace characters that the terminal cannot show; keep bytes that are not text.

    Those are judged by `reading.well_formed`.
    """
    streams = (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    )
    for stream, errors in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _keep_off_hubs() -> None:
    """Only `pull` and names of models reach the hub.

    Set before the libraries that read these variables are imported.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("USE_HUB_KERNELS", "0")


def _place(error: BaseException) -> str:
    """File and line that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "nowhere"
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"


def _complain(text: str) -> int:
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()
    print(f"hybrimoe: error: {one_line(text)}", file=sys.stderr)
    return BAD_INPUT


def _silence_stdout() -> None:
    """Point stdout at nothing, or the interpreter would complain when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
