"""`hybrimoe demo-model`: build the demo model, or say where it is."""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.flags import add_flag, add_switch
from hybrimoe_plugin.cli.imports import import_libraries

FORMS = ("mixtral", "qwen2moe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flag(
        parser, "form", choices=FORMS, default=FORMS[0],
        help="mixtral: 8 experts, top-2; qwen2moe: many small experts and a shared one (default "
             "mixtral)",
    )  # fmt: skip
    add_switch(parser, "rebuild", "build it again even if it is there")


def run(args: argparse.Namespace) -> int:
    """Build where needed and print the path of the GGUF on stdout."""
    import_libraries()
    from hybrimoe_plugin.cli.models import demo_gguf

    print(demo_gguf(args.form, rebuild=args.rebuild))
    return 0
