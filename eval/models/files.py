"""The file that a question measures: the demo model, a synthetic one, or a model's own."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

import torch

from eval.models import synthetic

MODELS = ("demo", *synthetic.SHAPES)

Slices = Mapping[str, tuple[int, int | None]]
"""Synthetic model -> its layers, and its routed experts in each (None for all), by default."""


def add_options(parser: ArgumentParser) -> None:
    """Which file, and how many threads compute it. Mutates `parser`."""
    parser.add_argument(
        "--model", choices=MODELS, default="demo", help="demo, or a synthetic file of that shape"
    )
    parser.add_argument("--gguf_path", type=Path, help="a model's own file instead")
    parser.add_argument("--model_path", type=Path, help="directory with its config, if it has one")
    parser.add_argument("--layers", type=int, help="layers of the synthetic file")
    parser.add_argument(
        "--experts", type=int, help="routed experts in each layer of the synthetic file"
    )
    parser.add_argument("--quantisation", choices=synthetic.QUANTISATIONS, default="Q4_K_M")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for every system alike"
    )


def chosen(args: Namespace, slices: Slices) -> tuple[str, Path]:
    """(name, file) of the model that `add_options` was asked for; built where it is missing.

    Args:
        slices: used where neither layers nor experts were asked for.
    """
    if args.gguf_path is not None:
        return args.gguf_path.stem, args.gguf_path
    if args.model == "demo":
        from hybrimoe_plugin.demo.build import build_demo_model

        return args.model, build_demo_model("mixtral")
    layers, experts = slices[args.model]
    if args.experts is not None:
        experts = args.experts
    elif args.layers is not None:
        experts = None  # layers that were asked for have all their experts
    built = synthetic.build(args.model, args.layers or layers, args.quantisation, experts)
    return args.model, built
