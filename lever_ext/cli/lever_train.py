"""`hybrimoe lever_train`: train the early-exit predictor of a packed target."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_flag, number, size, whole
from hybrimoe_plugin.cli.imports import import_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flag(
        parser,
        "flash_pack",
        metavar="DIR",
        required=True,
        help="pack that hybrimoe flash_pack made",
    )
    add_flag(
        parser,
        "output",
        metavar="FILE",
        help="the predictor's file (default: exit.safetensors beside the pack)",
    )
    add_flag(
        parser,
        "text",
        metavar="FILE",
        help="text like the model's answers; default: a short built-in text",
    )
    add_flag(
        parser,
        "layer",
        type=whole(1),
        metavar="N",
        help="exit before this decoder layer (default: the middle)",
    )
    add_flag(
        parser,
        "epochs",
        type=whole(1),
        default=6,
        metavar="N",
        help="passes over the text (default 6)",
    )
    add_flag(
        parser,
        "tau",
        type=number(0.1, 100),
        metavar="0.1..100",
        default=2.0,
        help="softmax temperature of the loss (default 2)",
    )
    add_flag(
        parser,
        "candidate_weight",
        type=number(0, 100),
        metavar="0..100",
        default=1.0,
        help="weight of the part of the loss that is about candidates (default 1)",
    )
    add_flag(
        parser,
        "dram_budget",
        type=size,
        metavar="BYTES",
        help="memory for the target's weights; default: all of them",
    )


def run(args: argparse.Namespace) -> int:
    """Train with a progress bar; print the predictor's path on stdout, layer and loss on stderr."""
    import_libraries()
    from tqdm import tqdm

    from hybrimoe_plugin.cli.reading import read_prompt_file
    from lever_ext.exit_training import ExitTraining, train_exit
    from lever_ext.packing import pack_tokenizer
    from lever_ext.target import load_target

    text = training_text() if args.text is None else read_prompt_file(args.text)
    settings = ExitTraining(tau=args.tau, weight=args.candidate_weight, epochs=args.epochs)
    directory = Path(args.flash_pack)
    beside_pack = directory if directory.is_dir() else directory.parent
    output = args.output or beside_pack / "exit.safetensors"
    target = load_target(directory, dram_budget=args.dram_budget)
    try:
        ids = pack_tokenizer(directory)(text, add_special_tokens=False).input_ids
        with tqdm(leave=False, unit=" positions") as bar:

            def progress(stage: str, done: int, total: int) -> None:
                bar.set_description(stage, refresh=False)
                bar.total = total
                bar.update(done - bar.n)

            made = train_exit(target, ids, output, args.layer, settings, progress)
    finally:
        target.close()
    notice(
        f"exit before layer {made.layer}, loss {made.loss:.3f} on held-out positions of "
        f"{len(ids)} tokens"
    )
    print(output)
    return 0


def training_text() -> str:
    """Conversations, and commented code of Python's standard library: about 10,000 tokens."""
    import fractions
    import statistics
    import textwrap

    from hybrimoe_plugin.demo.text import CALIBRATION

    modules: tuple[Any, ...] = (textwrap, fractions, statistics)
    parts = [CALIBRATION]
    for module in modules:
        source = Path(module.__file__).read_text(encoding="utf-8")
        parts.append(source[:16000])
    return "\n".join(parts)
