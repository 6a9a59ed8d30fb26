"""`hybrimoe translate_rules`: kTransformers' rules, written for `local_chat`."""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rules", type=path, metavar="YAML", help="rules file of kTransformers 0.2 to 0.4"
    )


def run(args: argparse.Namespace) -> int:
    """Print the new rules, and on stderr what became of each old one."""
    from hybrimoe_plugin.hosts.ktransformers.translate import translate_file

    translation = translate_file(args.rules)
    for note in translation.notes:
        notice(note)
    if not translation.needed:
        notice(f"the packaged rules of {translation.family} do the same: no --rules is needed")
    print(translation.text, end="")
    return 0
