"""`hybrimoe install_ktransformers`: install the pinned ktransformers without a compiler."""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_switch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "force", "replace another version of ktransformers that is installed here")


def run(args: argparse.Namespace) -> int:
    """Install it if needed, and say which version is installed."""
    from hybrimoe_plugin.hosts.ktransformers.install import install
    from hybrimoe_plugin.hosts.ktransformers.release import VERSION

    spent = install(force=args.force)
    how = f"now installed, after {spent:.0f} s" if spent else "installed already"
    notice(f"ktransformers {VERSION} is {how}")
    return 0
