"""`hybrimoe install_ktransformers`: the pinned ktransformers into this environment, without a
compiler.
"""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_switch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "force", "replace another ktransformers that is installed here")


def run(args: argparse.Namespace) -> int:
    """Install where needed and say what is there now."""
    from hybrimoe_plugin.hosts.ktransformers.install import install
    from hybrimoe_plugin.hosts.ktransformers.release import VERSION

    spent = install(force=args.force)
    notice(
        f"ktransformers {VERSION} is installed" + (f" after {spent:.0f} s" if spent else " already")
    )
    return 0
