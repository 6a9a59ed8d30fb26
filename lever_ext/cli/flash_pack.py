"""`hybrimoe flash_pack`: lay a model out for direct reads from flash."""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_flag, add_model, add_switch
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
        choices=("auto", *DTYPES),
        default="auto",
        help="stored type of the weights; auto is float16, or bfloat16 where values would not fit "
        "(default auto)",
    )
    add_switch(parser, "force", "replace a pack that is in the directory", False)


def run(args: argparse.Namespace) -> int:
    """Pack with a progress bar; print the pack's path on stdout."""
    import_libraries()
    from lever_ext.cli.progress import packing_bar
    from lever_ext.packing import pack_model, stored_dtype

    with packing_bar() as bar:
        path = pack_model(
            args.output, args.model_path, args.gguf_path, args.dtype, bar, force=args.force
        )
    notice(f"the pack's weights are stored in {stored_dtype(path)}")
    print(path)
    return 0
