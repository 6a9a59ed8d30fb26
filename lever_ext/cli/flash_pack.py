"""`hybrimoe flash_pack`: lay a model out for direct reads from flash."""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.flags import add_flag, add_model
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.config import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_flag(
        parser,
        "output",
        metavar="DIR",
        required=True,
        help="directory for the pack and its tokenizer",
    )
    add_flag(
        parser,
        "dtype",
        choices=DTYPES,
        default="bfloat16",
        help="stored type of the weights (default bfloat16)",
    )


def run(args: argparse.Namespace) -> int:
    """Pack with a progress bar; print the pack's path on stdout."""
    import_libraries()
    from lever_ext.cli.progress import packing_bar
    from lever_ext.packing import pack_model

    with packing_bar() as bar:
        path = pack_model(args.output, args.model_path, args.gguf_path, args.dtype, bar)
    print(path)
    return 0
