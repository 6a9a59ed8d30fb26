"""`hybrimoe pull`: fetch a model from the Hugging Face hub."""

from __future__ import annotations

import argparse

from hybrimoe_plugin.cli.console import notice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="ORG/REPO",
        help="with :QUANTISATION (such as :Q4_K_M) or :FILE.gguf behind it where it has several",
    )


def run(args: argparse.Namespace) -> int:
    """Fetch what is missing, and print the path.

    Raises:
        HybriMoEError: as `pull`.
    """
    from hybrimoe_plugin.hosts.hub.fetch import pull

    path = pull(args.name, notice)
    flag = "model_path" if path.is_dir() else "gguf_path"
    notice(f"chat with it: hybrimoe local_chat --{flag} {path}")
    print(path)
    return 0
