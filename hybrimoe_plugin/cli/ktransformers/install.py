"""`hybrimoe install_ktransformers`: install the pinned ktransformers without a compiler."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_flag, add_switch
from hybrimoe_plugin.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flag(
        parser,
        "venv",
        metavar="DIR",
        help="make an environment for it there, with the libraries that it pins; default: here",
    )
    add_switch(parser, "force", "replace another version of ktransformers that is installed here")


def run(args: argparse.Namespace) -> int:
    """Install it if needed, and say which version is installed."""
    from hybrimoe_plugin.hosts.ktransformers.release import VERSION

    if args.venv is not None:
        return _make(args)
    from hybrimoe_plugin.hosts.ktransformers.install import install

    spent = install(force=args.force)
    how = f"now installed, after {spent:.0f} s" if spent else "installed already"
    notice(f"ktransformers {VERSION} is {how}")
    return 0


def _make(args: argparse.Namespace) -> int:
    """Make an environment, and say how to start it."""
    from hybrimoe_plugin.hosts.ktransformers.environment import is_current, make
    from hybrimoe_plugin.hosts.ktransformers.release import VERSION

    if args.force:
        raise ConfigError("--force replaces what is installed here; with --venv nothing is")
    venv = Path(args.venv)
    if not is_current(venv):
        notice(f"making an environment with ktransformers {VERSION} in {venv}")
    spent = make(venv)
    how = f"ready after {spent:.0f} s" if spent else "up to date"
    notice(f"{how}; start it: {venv / 'bin' / 'hybrimoe'} ktransformers_chat --demo")
    return 0
