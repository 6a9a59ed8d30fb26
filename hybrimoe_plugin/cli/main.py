"""Entry point of the `hybrimoe` command: finds the sub-command, turns errors into one line and an
exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from hybrimoe_plugin import __version__
from hybrimoe_plugin.cli.flags import Parser, underscored
from hybrimoe_plugin.errors import ConfigError, HybriMoEError

log = logging.getLogger(__name__)

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
"""128 + the number of SIGPIPE, as a shell would report it."""


@dataclass(frozen=True)
class Command:
    """A sub-command. Its module has `add_arguments(parser)` and `run(args) -> exit code`."""

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
        "demo-model", "build the demo model, or say where it is", "hybrimoe_plugin.cli.demo_model"
    ),
    Command("flash-pack", "lay a model out on flash, for direct reads", "lever_ext.cli.flash_pack"),
    Command("lever-train", "train the early exit of a packed target", "lever_ext.cli.lever_train"),
    Command(
        "doctor",
        "what is installed, which backends work and why not, what fits",
        "hybrimoe_plugin.cli.doctor",
    ),
    Command(
        "ktransformers_chat",
        "ktransformers.local_chat itself, patched",
        "hybrimoe_plugin.cli.ktransformers_chat",
    ),
    Command(
        "install_ktransformers",
        "ktransformers, no compiler",
        "hybrimoe_plugin.cli.install_ktransformers",
    ),
    Command(
        "patches",
        "what ktransformers lacks here and what replaces it",
        "hybrimoe_plugin.cli.patches",
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
        the exit code: 0 done, 2 bad input, 130 interrupted, 141 nobody reads the output any more.
    """
    _tolerant_streams()
    _keep_off_hubs()
    try:
        try:
            return _dispatch(list(sys.argv[1:] if argv is None else argv), commands)
        except SystemExit as stop:
            # argparse ends by itself after --help and --version.
            return stop.code if isinstance(stop.code, int) else 0
        finally:
            # Here rather than at exit, where a closed pipe could no longer be handled.
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
        # A fault of ours, or of a library that nobody foresaw.
        log.info("in detail", exc_info=error)
        return _complain(
            f"unexpected {type(error).__name__}: {error} ({_place(error)}; -v shows more)"
        )


def _dispatch(argv: list[str], commands: Sequence[Command]) -> int:
    parser = Parser(prog="hybrimoe", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hybrimoe {__version__}")
    table = parser.add_subparsers(dest="command", metavar="command", title="commands")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    chosen = None
    for command in commands:
        aliases = [command.name.replace("_", "-"), command.name.replace("-", "_")]
        names = [alias for alias in dict.fromkeys(aliases) if alias != command.name]
        sub = table.add_parser(
            command.name,
            aliases=names,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
        )
        if wanted in (command.name, *names):
            # Only the chosen module is imported: some of them pull in rich, later torch.
            chosen = find_module(command.module)
            sub.add_argument(
                "-v", "--verbose", action="store_true", help="say more about what happens"
            )
            chosen.add_arguments(sub)
    args = parser.parse_args(underscored(argv))
    if chosen is None:
        parser.print_help()
        return BAD_INPUT if argv else 0
    logging.basicConfig(format="hybrimoe: %(message)s", stream=sys.stderr, level=logging.WARNING)
    if args.verbose:
        logging.getLogger("hybrimoe_plugin").setLevel(logging.INFO)
    code: int = chosen.run(args)
    return code


_DESCRIPTION = (
    "MoE models whose experts are scheduled over CPU and accelerator, injected by "
    "kTransformers-style rules."
)


def _tolerant_streams() -> None:
    """What the terminal cannot show is replaced; what it sends that is no text is kept, for
    `well_formed` to judge.
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
    """Models are files here. Set before the libraries that read it are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("USE_HUB_KERNELS", "0")


def _place(error: BaseException) -> str:
    """Where it was raised: file and line."""
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
    """Point stdout at nothing, or the interpreter would complain while it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
