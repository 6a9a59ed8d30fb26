"""`hybrimoe convert`: write a quantised checkpoint as a GGUF file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_flag, path
from hybrimoe_plugin.cli.imports import import_libraries

_FP8 = ("Q8_0", "BF16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="DIR", type=path, help="model directory with safetensors files"
    )
    parser.add_argument(
        "output",
        metavar="FILE",
        type=path,
        nargs="?",
        help="GGUF file to write; default: model.gguf in DIR",
    )
    add_flag(
        parser,
        "fp8",
        choices=_FP8,
        default=_FP8[0],
        help="type for FP8 weights: Q8_0, or BF16, which is closer and takes twice the space",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and print the file's path.

    Raises:
        HybriMoEError: as `convert`.
    """
    import_libraries()
    from hybrimoe_plugin.hosts.transformers.convert.write import convert

    path = convert(args.source, args.output, fp8=args.fp8, progress=_bar)
    notice(f"chat with it: hybrimoe local_chat --gguf_path {path} --model_path {args.source}")
    print(path)
    return 0


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc="converting",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        disable=not sys.stderr.isatty(),
        file=sys.stderr,
    ) as bar:
        yield bar.update
