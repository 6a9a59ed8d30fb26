"""`hybrimoe demo_model`: build the demo model and print its path."""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.flags import add_flag, add_switch
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.config import DEMO_FORMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flag(
        parser,
        "form",
        choices=DEMO_FORMS,
        default=DEMO_FORMS[0],
        help="mixtral: 8 experts, top-2; qwen2moe: many small experts and a shared one",
    )
    add_switch(parser, "rebuild", "build it even if it exists")


def run(args: argparse.Namespace) -> int:
    """Build the model if needed and print the path of its GGUF file."""
    import_libraries()
    from hybrimoe_plugin.cli.models import demo_gguf

    print(demo_gguf(args.form, rebuild=args.rebuild))
    return 0
