"""`hybrimoe ktransformers_chat`: the original `ktransformers.local_chat`, with our rules.

The patches that it needs in this environment are applied: see `hybrimoe patches`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cli.chat.effects import Asked, Idle, beside_prompt, refuse_idle
from hybrimoe_plugin.cli.chat.flags import MODES
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_chat_flag, add_flag, add_switch, whole
from hybrimoe_plugin.errors import ConfigError

STOCK = "stock"
"""Value of --optimize_rule_path for kTransformers' own rules."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s --demo | --model_path DIR --gguf_path DIR"
    _add_theirs(parser.add_argument_group("flags of ktransformers.local_chat"))
    ours = parser.add_argument_group("flags of HybriMoE")
    add_chat_flag(ours, "prompt")
    add_chat_flag(ours, "demo")
    add_switch(
        ours, "greedy", "take the likeliest token; kTransformers samples with temperature 0.1"
    )
    add_chat_flag(ours, "seed")


def _add_theirs(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "model_path", metavar="DIR", help="directory with config.json and tokenizer")
    add_flag(group, "gguf_path", metavar="DIR", help="directory with the GGUF files of one model")
    add_flag(
        group,
        "optimize_rule_path",
        "optimize_config_path",
        "rules",
        metavar="YAML",
        help=f"rules file; {STOCK}: kTransformers' own for the model; default: ours for the model",
    )
    add_chat_flag(group, "max_new_tokens")
    add_flag(
        group,
        "cpu_infer",
        type=whole(1),
        metavar="N",
        help="threads for kTransformers' CPU experts",
    )
    add_switch(
        group,
        "use_cuda_graph",
        "use CUDA graphs; for kTransformers' own operators only (default off)",
        None,
    )
    add_chat_flag(group, "prompt_file")
    add_flag(
        group,
        "mode",
        choices=MODES,
        help="normal, or long_context where kTransformers was compiled",
    )
    add_switch(group, "force_think", "begin every answer with <think>")


def _seed(asked: Asked) -> str | None:
    if not asked.value("greedy"):
        return None
    return "--greedy takes the likeliest token: leave one of them out"


IDLE = (Idle(("prompt_file",), beside_prompt), Idle(("seed",), _seed))
"""Flags that have no effect beside others."""


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends, then print the engine's counters."""
    refuse_idle(Asked(args, flash=False), IDLE)
    from hybrimoe_plugin.hosts.ktransformers.launch import Launch, run_local_chat

    flags = _flags(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    launch = Launch(flags, args.prompt, greedy=args.greedy, seed=args.seed, quiet=not args.verbose)
    model: list[Any] = []
    run_local_chat(launch, model.append)
    if model:
        _report(model[0])
    return 0


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags for `ktransformers.local_chat`.

    Raises:
        ConfigError: no model is named, or CUDA graphs are asked for with our rules.
    """
    model_path, gguf_path = _model(args)
    rules = _rules(args.optimize_rule_path, model_path)
    if rules is not None and args.use_cuda_graph:
        raise ConfigError(
            "--use_cuda_graph True does not go with HybriMoE, which plans every layer call anew: "
            f"give --use_cuda_graph False, or --optimize_rule_path {STOCK} for kTransformers' own "
            "operators"
        )
    return {
        "model_path": model_path,
        "gguf_path": gguf_path,
        "optimize_rule_path": rules,
        "max_new_tokens": args.max_new_tokens,
        "cpu_infer": args.cpu_infer,
        # Always given: kTransformers' own default is True.
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
        # kTransformers would look it up on a model hub.
        raise ConfigError(f"{args.model_path}: no such directory")
    return args.model_path, args.gguf_path


def _rules(given: str | None, model_path: str) -> str | None:
    """The rules file; None for kTransformers' own.

    Raises:
        ConfigError: there is no such rules file.
    """
    if given == STOCK:
        return None
    import torch

    from hybrimoe_plugin.hosts.ktransformers.launch import names_cuda, packaged_rules

    if given is None:
        device = "gpu" if torch.cuda.is_available() else "cpu"
        return str(packaged_rules(model_path, device))
    path = _found(given)
    if names_cuda(path):
        if not torch.cuda.is_available():
            notice("no CUDA device: what the rules place on cuda runs on the CPU")
    elif not torch.cuda.is_initialized():
        # local_chat would ask CUDA to switch to the device that the rules name, even to cpu.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
    from hybrimoe_plugin.cli.chat.report import EngineReport

    print()  # behind the host's last prompt
    for line in EngineReport(model).facts():
        print(line)
