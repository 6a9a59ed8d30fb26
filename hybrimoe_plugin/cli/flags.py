"""Flags as kTransformers users type them, and the parser that reads them.

Accepted are `--flag value`, `--flag=value`, `--flag True`, `--noflag` and `--a-flag`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from hybrimoe_plugin.config import DEMO_FORMS, parse_bytes
from hybrimoe_plugin.device.choice import device_name
from hybrimoe_plugin.errors import ConfigError, did_you_mean

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_MOST_COLUMNS = 100
_NAME_COLUMNS = 28
"""Longer names have a line of their own."""

_PATHS = ("DIR", "FILE", "NAME|FILE", "PATH", "YAML")
"""What help calls values that are paths."""

SEEDS = 2**64 - 1
"""The largest seed of torch's generators."""

Arguments = argparse.ArgumentParser | argparse._ArgumentGroup


class Help(argparse.HelpFormatter):
    """Help of at most 100 columns.

    Args:
        prog: name of the command.
        common: names of the flags to show, besides arguments without one; None shows all.
    """

    def __init__(self, prog: str, common: Collection[str] | None = None) -> None:
        columns = min(_MOST_COLUMNS, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=_NAME_COLUMNS, width=columns - 2)
        self._common = common

    def add_argument(self, action: argparse.Action) -> None:
        is_flag = bool(action.option_strings)
        if self._common is None or not is_flag or is_named(action, self._common):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # The value once, after the last spelling; argparse does so from Python 3.13 on.
        if len(action.option_strings) < 2 or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.dest.upper())
        return f"{', '.join(action.option_strings)} {value}"

    def _iter_indented_subactions(
        self, action: argparse.Action
    ) -> Generator[argparse.Action, None, None]:
        # Commands are not indented below a line that `_format_action` takes away.
        if isinstance(action, argparse._SubParsersAction):
            yield from action._get_subactions()

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        if isinstance(action, argparse._SubParsersAction):
            # The list of commands, without a line for the word "command" above it.
            return text.partition("\n")[2]
        return text


class Parser(argparse.ArgumentParser):
    """A parser that formats help as above and raises ConfigError for wrong arguments.

    Attributes:
        synonyms: name of a flag in another program -> ours, both without dashes; for suggestions.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", Help)
        super().__init__(*args, **options)
        self.synonyms: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but nothing unknown is handed back: the command that finds it refuses it.

        So the message can name the nearest flag of that command.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._about(unknown))
        return found, unknown

    def _about(self, unknown: Sequence[str]) -> str:
        """The message for arguments that are none."""
        flags = [word for word in unknown if word.startswith("-")]
        if not flags:
            return f"{unknown[0]!r} belongs to no flag{self._flag_for(unknown[0])}"
        name = flags[0].partition("=")[0]
        same = self.synonyms.get(name.lstrip("-"))
        if same is not None:
            return f"there is no flag {name}; did you mean --{same}?"
        return f"there is no flag {name}{did_you_mean(name, self._spellings())}"

    def _flag_for(self, value: str) -> str:
        """The end of a message about a value without a flag: the flag that it may be meant for."""
        for name, fits in (("gguf_path", value.endswith(".gguf")), ("prompt", " " in value)):
            if fits and f"--{name}" in self._spellings():
                return f"; did you mean --{name} {value!r}?"
        return ""

    def _spellings(self) -> list[str]:
        """Every flag that help shows."""
        found: list[str] = []
        for action in self._actions:
            if action.help != argparse.SUPPRESS:
                found += action.option_strings
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(
            action,
            f"expected one of {', '.join(choices)}, found {str(value)!r}"
            f"{did_you_mean(str(value), choices)}",
        )

    def shorten_usage(self) -> None:
        """Let the usage show what must be given, and `[flags]` for the rest. Mutates."""
        needed = []
        for action in self._actions:
            value = str(action.metavar)
            if not action.option_strings and not isinstance(action, argparse._SubParsersAction):
                some = {"?": f"[{value}]", "*": f"[{value} ...]"}
                needed.append(some.get(str(action.nargs), value))
            elif action.required:
                needed.append(f"{action.option_strings[0]} {value}")
        self.usage = " ".join(("%(prog)s", *needed, "[flags]"))

    def shorten_help(self, common: Collection[str]) -> None:
        """Let `--help` show these flags only, and `--help_all` every flag."""
        shown = {*common, "help", "help_all", "verbose"}
        self.formatter_class = partial(Help, common=shown)
        self.epilog = f"{self.prog} --help_all shows all flags."
        self.add_argument("--help_all", action=_HelpAll, help="show every flag and exit")


class _HelpAll(argparse.Action):
    """Prints the help that `Parser.shorten_help` has shortened, in full."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.formatter_class = Help
        parser.epilog = None
        parser.print_help()
        parser.exit()


def is_named(action: argparse.Action, names: Collection[str]) -> bool:
    """Whether one of the names is a spelling of the flag, without its dashes."""
    return any(spelling.lstrip("-") in names for spelling in action.option_strings)


def underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with every `--some-flag` written `--some_flag`; values stay unchanged."""
    found: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return found + list(argv[position:])
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            name = flag.removeprefix("--").replace("-", "_")
            word = f"--{name}{equals}{value}"
        found.append(word)
    return found


def add_flag(arguments: Arguments, name: str, *aliases: str, **options: Any) -> None:
    """Add `--name` and its aliases; its help names the default unless it does so already.

    A value that is called `DIR`, `FILE`, `PATH` or `YAML` must not be empty.
    """
    default = options.get("default")
    help = options["help"]
    if default not in (None, False, argparse.SUPPRESS) and "default" not in help:
        options["help"] = f"{help} (default {default})"
    # argparse would name the value after the flag, in capitals.
    assert "choices" in options or "action" in options or "metavar" in options, name
    options.setdefault("dest", name)
    if options.get("metavar") in _PATHS:
        options.setdefault("type", path)
    spellings = [f"--{word}" for word in (name, *aliases)]
    arguments.add_argument(*spellings, **options)


def add_switch(arguments: Arguments, name: str, help: str, default: bool | None = False) -> None:
    """Add a flag that is true when given bare and takes True or False; `--noname` turns it off."""
    arguments.add_argument(
        f"--{name}",
        dest=name,
        type=truth,
        nargs="?",
        const=True,
        default=default,
        metavar="True|False",
        help=help,
    )
    arguments.add_argument(
        f"--no{name}",
        f"--no_{name}",
        dest=name,
        action="store_false",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def add_chat_flag(arguments: Arguments, name: str) -> None:
    """Add a flag that both chats have, ours and the classic one."""
    options: dict[str, dict[str, Any]] = {
        "prompt": {"metavar": "TEXT", "help": "answer this prompt and exit"},
        "prompt_file": {
            "metavar": "FILE",
            "help": "file whose text an empty line sends, in a conversation",
        },
        "max_new_tokens": {
            "type": whole(1),
            "default": 300,
            "metavar": "N",
            "help": "longest answer, in tokens",
        },
        "seed": {"type": whole(0, SEEDS), "metavar": "N", "help": "seed of the random numbers"},
        "demo": {
            "nargs": "?",
            "const": DEMO_FORMS[0],
            "choices": DEMO_FORMS,
            "help": "take the demo model, built on first use",
        },
    }
    add_flag(arguments, name, **options[name])


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that name a model."""
    group = parser.add_argument_group("model")
    add_flag(
        group,
        "gguf_path",
        metavar="PATH",
        help="GGUF file, directory with the GGUF files of one model, or ORG/REPO:QUANTISATION of "
        "the Hugging Face hub",
    )
    add_flag(
        group,
        "model_path",
        metavar="DIR",
        help="directory with config.json and tokenizer (default: the GGUF's own), and with "
        "safetensors where there is no GGUF",
    )
    return group


def truth(text: str) -> bool:
    """True or False as Python, YAML and shells write them."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


def path(text: str) -> str:
    """A path as it was typed; the empty one, which would mean the current folder, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return text


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reader of whole numbers of at least `low`, and at most `high`."""
    span = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected a whole number {span}, found {text!r}")
        return value

    return read


def size(text: str) -> str:
    """A number of bytes such as 1GiB, as it was typed; whoever uses it turns it into a number."""
    try:
        parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from None
    return text


def device(text: str) -> str:
    """The name of a device; whether there is such a device is checked later."""
    try:
        return device_name(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device: ")) from None


def number(low: float, high: float) -> Callable[[str], float]:
    """Reader of numbers from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to {high:g}, found {text!r}"
            )
        return value

    return read
