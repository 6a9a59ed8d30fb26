"""`hybrimoe doctor`: show what is installed, which backends work and what fits into memory."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata

from hybrimoe_plugin import extras
from hybrimoe_plugin.cli.checks import backends, kept, memory
from hybrimoe_plugin.cli.checks.check import Check
from hybrimoe_plugin.cli.console import notice, tables
from hybrimoe_plugin.cli.flags import add_flag, add_switch
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.files import printable

Sections = dict[str, list[Check]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "json", "print one JSON object instead of tables")
    add_flag(parser, "gguf_path", metavar="PATH", help="model to check against free memory")
    add_flag(
        parser,
        "model_path",
        metavar="DIR",
        help="its directory with config.json, or with safetensors too",
    )
    add_flag(
        parser,
        "fix",
        nargs="?",
        const=extras.KERNELS.part,
        choices=[extra.part for extra in extras.EXTRAS],
        help="install, with pip, the fast CPU kernels (given bare) or what the demo model is built "
        "from; checks nothing else",
    )


def run(args: argparse.Namespace) -> int:
    """Check and print everything; that a backend does not work is a result, not a failure.

    Raises:
        BackendError: something was to be installed and could not be.
    """
    if args.fix is not None:
        fix(next(extra for extra in extras.EXTRAS if extra.part == args.fix))
        return 0
    found = examine(args.gguf_path, args.model_path)
    if args.json:
        print(_json(found))
    else:
        _print(found)
    return 0


def fix(extra: extras.Extra) -> None:
    """Install a package unless it is there and works.

    Raises:
        BackendError: it could not be installed, or does not load.
    """
    if _problem(extra) is None:
        notice(f"{extra.requirement} is installed already")
        return
    notice(
        f"installing {extra.requirement} ({extra.megabytes} MB) into this environment: "
        f"pip install --no-deps {extra.requirement}, compared with known hashes"
    )
    extras.install(extra)
    problem = _problem(extra)
    if problem is not None:
        raise BackendError(f"{extra.requirement} is installed, but does not work: {problem}")
    notice(f"{extra.requirement} is installed and works")


def _problem(extra: extras.Extra) -> str | None:
    """What is wrong with an installed package; None if nothing is."""
    importlib.invalidate_caches()
    try:
        version = metadata.version(extra.name)
    except metadata.PackageNotFoundError:
        return "it is not installed"
    if version != extra.version:
        return f"version {version} is installed"
    if extra is not extras.KERNELS:
        return None
    checks = (backends.kt_kernel(), backends.ggml())
    return next((check.detail for check in checks if not check.ok), None)


def examine(gguf_path: str | None = None, model_path: str | None = None) -> Sections:
    """All checks by section, and with a model whether it fits; none of them raises."""
    sections: Mapping[str, Sequence[Callable[[], Check]]] = {
        "backends": (
            backends.kt_kernel,
            backends.ggml,
            backends.operations,
            backends.torch_cpu,
            backends.cuda,
            backends.triton,
            backends.flashinfer,
            backends.cache_learning,
            backends.emulated,
            backends.server,
        ),
        "classic ktransformers host": (backends.ktransformers, backends.patches),
        "memory": (memory.host, memory.accelerator),
        "kept on disk": (kept.cache_folder, kept.profiles),
    }
    found = {"installed": backends.installed()}
    for section, checks in sections.items():
        found[section] = [_guarded(check) for check in checks]
    if gguf_path is not None or model_path is not None:
        fits = (memory.model_on_host, memory.model_on_accelerator)
        found["model"] = [_guarded(partial(check, gguf_path, model_path)) for check in fits]
    return found


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        # A broken installation may raise anything, and this command is there to report it.
        function = check.func if isinstance(check, partial) else check
        name = getattr(function, "__name__", "check").replace("_", " ")
        message = " ".join(str(error).split())
        return Check(name, False, f"{type(error).__name__}: {message}")


def _json(found: Sections) -> str:
    plain = {}
    for section, checks in found.items():
        plain[section] = [asdict(check) for check in checks]
    return json.dumps(plain)


def _print(found: Sections) -> None:
    from rich.table import Table
    from rich.text import Text

    # What is neither good nor bad has no mark.
    marks = {True: Text("yes", "green"), False: Text("no", "red"), None: Text()}
    console = tables()
    for section, checks in found.items():
        table = Table(
            title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        for _ in range(3):
            table.add_column(overflow="fold")  # a path is of use only as a whole
        for check in checks:
            table.add_row(marks[check.ok], check.name, Text(printable(check.detail)))
        console.print(table)
        console.print()
