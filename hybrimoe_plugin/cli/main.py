"""Entry point of the `hybrimoe` command: finds the sub-command, reports errors in one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hybrimoe_plugin import __version__
from hybrimoe_plugin.cli.flags import Parser, underscored
from hybrimoe_plugin.errors import ConfigError, HybriMoEError

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


COMMANDS = (
    Command(
        "local_chat",
        "chat with a model whose experts HybriMoE schedules",
        "hybrimoe_plugin.cli.local_chat",
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
        "demo-model", "build the demo model and print its path", "hybrimoe_plugin.cli.demo_model"
    ),
    Command("flash-pack", "pack a model for direct reads from flash", "lever_ext.cli.flash_pack"),
    Command(
        "lever-train",
        "train the early-exit predictor of a packed model",
        "lever_ext.cli.lever_train",
    ),
    Command(
        "doctor",
        "show what is installed, which backends work and what fits into memory",
        "hybrimoe_plugin.cli.doctor",
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
        "patches",
        "list the patches that ktransformers needs here",
        "hybrimoe_plugin.cli.ktransformers.patches",
    ),
)

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


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default: the process's.
        commands: the table of sub-commands.

    Returns:
        the exit code: 0 done, 2 bad input, 130 interrupted, 141 the reader closed the output.
    """
    _tolerant_streams()
    _keep_off_hubs()
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
    logging.basicConfig(format="hybrimoe: %(message)s", stream=sys.stderr, level=logging.WARNING)
    parser = Parser(prog="hybrimoe", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hybrimoe {__version__}")
    table = parser.add_subparsers(dest="command", metavar="command", title="commands")
    place = next((at for at, word in enumerate(argv) if not word.startswith("-")), None)
    wanted = None if place is None else argv[place].replace("-", "_")
    chosen = None
    for command in commands:
        about = f"{_capitalised(command.help)}."
        sub = table.add_parser(
            command.name, help=command.help, description=about, allow_abbrev=False
        )
        if place is not None and wanted == command.name.replace("-", "_"):
            argv[place] = command.name  # written with either dash
            # Only the chosen module is imported: some import rich, and torch when they run.
            chosen = find_module(command.module)
            _add_arguments(sub, chosen)
    args = parser.parse_args(underscored(argv))
    if chosen is None:
        parser.print_help()
        return BAD_INPUT if argv else 0
    if args.verbose:
        logging.getLogger("hybrimoe_plugin").setLevel(logging.INFO)
    code: int = chosen.run(args)
    return code


def _add_arguments(parser: Parser, module: Any) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="print more details")
    common = getattr(module, "COMMON", None)
    if common is not None:
        parser.shorten_help(common)
    module.add_arguments(parser)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


_DESCRIPTION = (
    "Run mixture-of-experts models whose experts are shared between CPU and accelerator; "
    "operators are injected by kTransformers-style rules."
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
    """Models are local files. Set before the libraries that read these variables are imported."""
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
    print(f"hybrimoe: error: {' '.join(text.split())}", file=sys.stderr)
    return BAD_INPUT


def _silence_stdout() -> None:
    """Point stdout at nothing, or the interpreter would complain when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
