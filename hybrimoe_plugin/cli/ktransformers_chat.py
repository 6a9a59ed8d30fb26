"""`hybrimoe ktransformers_chat`: the real `ktransformers.local_chat`, with our rules and the
patches it needs here.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.demo_model import FORMS
from hybrimoe_plugin.cli.flags import SEEDS, add_flag, add_switch, whole
from hybrimoe_plugin.errors import ConfigError

STOCK = "stock"
"""Value of --optimize_rule_path for kTransformers' own rules."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    theirs = parser.add_argument_group("flags of ktransformers.local_chat")
    add_flag(theirs, "model_path", metavar="DIR", help="directory with config.json and tokenizer")
    add_flag(theirs, "gguf_path", metavar="DIR", help="directory with the GGUF files of one model")
    add_flag(
        theirs, "optimize_rule_path", "optimize_config_path", "rules", metavar="YAML",
        help=f"rules file; {STOCK}: kTransformers' own for the model; default: ours for the model",
    )  # fmt: skip
    add_flag(
        theirs,
        "max_new_tokens",
        type=whole(1),
        default=300,
        metavar="N",
        help="longest answer (default 300)",
    )
    add_flag(
        theirs,
        "cpu_infer",
        type=whole(1),
        metavar="N",
        help="threads for kTransformers' own CPU experts",
    )
    add_switch(
        theirs, "use_cuda_graph", "goes with kTransformers' own operators only; default: off", None
    )
    add_flag(theirs, "prompt_file", metavar="FILE", help="prompt that an empty line sends")
    add_flag(
        theirs,
        "mode",
        metavar="MODE",
        help="normal, or long_context where kTransformers was compiled",
    )
    add_switch(theirs, "force_think", "begin every answer with <think>")
    ours = parser.add_argument_group("ours")
    add_flag(ours, "prompt", metavar="TEXT", help="answer this once and exit, instead of talking")
    add_flag(ours, "demo", nargs="?", const=FORMS[0], choices=FORMS, help="the demo model")
    add_switch(ours, "greedy", "take the likeliest token; kTransformers draws with temperature 0.1")
    add_flag(ours, "seed", type=whole(0, SEEDS), metavar="N", help="of the random draw")


def run(args: argparse.Namespace) -> int:
    """Start it; its end is the end of the input."""
    from hybrimoe_plugin.hosts.ktransformers.launch import Launch, run_local_chat

    flags = _flags(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model: list[Any] = []
    run_local_chat(
        Launch(flags, args.prompt, greedy=args.greedy, seed=args.seed, quiet=not args.verbose),
        model.append,
    )
    if model:
        _report(model[0])
    return 0


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """What `local_chat` is started with.

    Raises:
        ConfigError: the model is not named, or CUDA graphs are asked for with our rules.
    """
    model_path, gguf_path = _model(args)
    rules = _rules(args.optimize_rule_path, model_path)
    if rules is not None and args.use_cuda_graph:
        raise ConfigError(
            "--use_cuda_graph True does not go with HybriMoE, which plans every layer call anew: "
            f"give --use_cuda_graph False, or --optimize_rule_path {STOCK} for kTransformers' own "
            f"operators"
        )
    return {
        "model_path": model_path,
        "gguf_path": gguf_path,
        "optimize_rule_path": rules,
        "max_new_tokens": args.max_new_tokens,
        "cpu_infer": args.cpu_infer,
        # Said in any case: kTransformers' own default is True.
        "use_cuda_graph": bool(args.use_cuda_graph),
        "prompt_file": args.prompt_file,
        "mode": args.mode,
        "force_think": args.force_think or None,
    }


def _model(args: argparse.Namespace) -> tuple[str, str]:
    if args.demo is not None:
        if args.model_path or args.gguf_path:
            raise ConfigError(
                "--demo names the demo model and --model_path or --gguf_path another one: give "
                "one of them"
            )
        from hybrimoe_plugin.hosts.ktransformers.demo import classic_folder

        folder = str(classic_folder(args.demo))
        return folder, folder
    if args.model_path is None or args.gguf_path is None:
        raise ConfigError(
            "give --model_path (config and tokenizer) and --gguf_path (weights), or --demo"
        )
    if not Path(args.model_path).is_dir():
        # kTransformers would look for it on a model hub.
        raise ConfigError(f"{args.model_path}: no such directory")
    return args.model_path, args.gguf_path


def _rules(given: str | None, model_path: str) -> str | None:
    """The rules file, None for kTransformers' own.

    Raises:
        ConfigError: rules without CUDA cannot be used any more in this process.
    """
    if given == STOCK:
        return None
    import torch

    from hybrimoe_plugin.hosts.ktransformers.launch import names_cuda, packaged_rules

    if given is None:
        return str(packaged_rules(model_path, "gpu" if torch.cuda.is_available() else "cpu"))
    path = _found(given)
    if (
        not names_cuda(path)
        and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
        and not torch.cuda.is_initialized()
    ):
        # local_chat asks CUDA to switch to whatever device the rules name, cpu too.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif names_cuda(path) and not torch.cuda.is_available():
        notice("no CUDA device: what the rules place on cuda runs on the CPU")
    return str(path)


def _found(given: str) -> Path:
    from importlib.resources import files

    packaged = Path(str(files("optimize_rules"))) / "ktransformers"
    for path in (Path(given), packaged / given, packaged / f"{given}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        f"{given}: no such rules file, and no packaged rules of that name in {packaged}"
    )


def _report(model: Any) -> None:
    from hybrimoe_plugin.cli.report import EngineReport

    line = EngineReport(model)()
    if line:
        print(line)
