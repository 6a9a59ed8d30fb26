"""`hybrimoe local_chat`: the flags of `ktransformers.local_chat`, and those of the engine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.demo_model import FORMS
from hybrimoe_plugin.cli.flags import (
    SEEDS,
    add_flag,
    add_model,
    add_settings,
    add_switch,
    given_settings,
    number,
    whole,
)
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.cli.main import FLASH_CHAT, find_module
from hybrimoe_plugin.cli.records import Records
from hybrimoe_plugin.config import COLDEST_TEMPERATURE
from hybrimoe_plugin.errors import ConfigError

SAMPLERS = ("auto", "transformers")
PIECE, CPU_PIECE = 8192, 512
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; without a model the chat is with the demo model."""
    parser.usage = "%(prog)s [--model_path DIR] [--gguf_path PATH] [--prompt TEXT] [flags]"
    model = add_model(parser)
    add_flag(
        model, "optimize_config_path", "optimize_rule_path", "rules", metavar="YAML",
        help="rules file, or the name of a packaged one; default: the packaged one of the model's "
             "family",
    )  # fmt: skip
    add_switch(model, "trust_rules", "let the rules import classes from any package")
    add_flag(
        model,
        "demo",
        nargs="?",
        const=FORMS[0],
        choices=FORMS,
        help="the demo model, built on first use",
    )
    add_flag(
        model,
        "dtype",
        choices=DTYPES,
        default="auto",
        help="of everything but the experts (default auto)",
    )
    _add_generation(parser.add_argument_group("answers"))
    add_settings(parser)
    find_module(FLASH_CHAT).add_arguments(parser)
    output = parser.add_argument_group("records")
    add_flag(
        output,
        "timeline",
        metavar="FILE",
        help="write the run as a trace for Perfetto or chrome://tracing",
    )
    add_flag(
        output,
        "record_trace",
        metavar="FILE",
        help="write the routing as a trace for the replay simulator",
    )
    _add_foreign(parser.add_argument_group("flags of ktransformers.local_chat"))


def run(args: argparse.Namespace) -> int:
    """Load the model, then answer one prompt or talk until /exit."""
    settings = _settings(args)
    sampling = _sampling(args)
    _explain_ignored(args)
    prompt = _one_shot(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_libraries()
    if find_module(FLASH_CHAT).is_selected(args):
        return _talk_flash(args, settings, sampling, prompt)
    with Records(args.timeline, args.record_trace) as records:
        model, tokenizer = _load(args, settings)
        return _talk(args, model, tokenizer, sampling, prompt, records)


def _add_generation(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "prompt", metavar="TEXT", help="answer this once and exit, instead of talking")
    add_flag(group, "prompt_file", metavar="FILE", help="prompt that an empty line sends")
    add_flag(
        group,
        "max_new_tokens",
        type=whole(1),
        default=300,
        metavar="N",
        help="longest answer (default 300)",
    )
    add_switch(
        group,
        "do_sample",
        "draw tokens at random; default: as the model's generation config says",
        None,
    )
    add_switch(group, "greedy", "always take the likeliest token")
    add_flag(
        group,
        "temperature",
        type=number(0, 100),
        help="flatter above 1, sharper below; 0 is greedy",
    )
    add_flag(
        group,
        "top_p",
        type=number(0, 1),
        help="draw from the likeliest tokens with this share of probability",
    )
    add_flag(
        group, "top_k", type=whole(1), metavar="N", help="draw from this many likeliest tokens"
    )
    add_flag(
        group,
        "min_p",
        type=number(0, 1),
        help="draw from tokens at least this share as likely as the likeliest",
    )
    add_flag(
        group,
        "sampler",
        choices=SAMPLERS,
        default="auto",
        help="on a GPU, filter by flashinfer where it is faster",
    )
    add_flag(group, "seed", type=whole(0, SEEDS), metavar="N", help="of the random draw")
    add_switch(group, "force_think", "begin every answer with <think>")
    add_flag(
        group, "chunk_prefill_size", type=whole(1), metavar="N",
        help=f"compute longer prompts in pieces of this many tokens (default {PIECE}; {CPU_PIECE} "
             f"on the CPU alone, "
        "where a piece that has begun does not hear Ctrl-C)",
    )  # fmt: skip


def _add_foreign(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "cpu_infer",
        type=whole(1),
        metavar="N",
        help="threads for CPU experts; the same as --cpu_threads",
    )
    add_switch(group, "use_cuda_graph", "accepted and ignored: see --cuda_graphs", None)
    add_flag(
        group,
        "mode",
        metavar="MODE",
        help="accepted and ignored: long contexts need no mode of their own",
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = given_settings(args)
    if args.cpu_infer is not None:
        if settings.get("cpu_threads", args.cpu_infer) != args.cpu_infer:
            raise ConfigError(
                f"--cpu_infer {args.cpu_infer} and --cpu_threads {settings['cpu_threads']} "
                f"differ: give one"
            )
        settings["cpu_threads"] = args.cpu_infer
    if args.demo is not None and (args.model_path or args.gguf_path):
        raise ConfigError(
            "--demo names the demo model and --model_path or --gguf_path another one: give one of "
            "them"
        )
    return settings


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Overrides of the model's generation config."""
    if args.greedy and args.do_sample:
        raise ConfigError("--greedy and --do_sample exclude each other: give one of them")
    cold = args.temperature is not None and args.temperature < COLDEST_TEMPERATURE
    if args.greedy or args.do_sample is False or cold:
        # Cleared, or transformers warns that they have no effect.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    sampling = {name: value for name, value in given.items() if value is not None}
    return {**sampling, "do_sample": True} if sampling or args.do_sample else {}


def _explain_ignored(args: argparse.Namespace) -> None:
    if args.use_cuda_graph:
        notice(
            "--use_cuda_graph has no effect: on a GPU graphs are used wherever they can be, see "
            "--cuda_graphs"
        )
    if args.mode not in (None, "normal"):
        notice(f"--mode {args.mode} has no effect")


def _one_shot(args: argparse.Namespace) -> str | None:
    from hybrimoe_plugin.cli.reading import read_prompt_file, well_formed

    if args.prompt_file is not None:
        # Read now: a missing file should not wait for the model to load.
        read_prompt_file(args.prompt_file)
    if args.prompt is None:
        if sys.stdin is None:
            raise ConfigError(
                "standard input is closed, so there is nothing to talk with: give --prompt"
            )
        return None
    if not args.prompt.strip():
        raise ConfigError("--prompt is empty")
    return well_formed(args.prompt)


def _load(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.utils import logging as transformers_logging

    from hybrimoe_plugin.hosts.transformers import load_model

    if not args.verbose:
        transformers_logging.set_verbosity_error()
    model_path, gguf_path = args.model_path, args.gguf_path
    if model_path is None and gguf_path is None:
        from hybrimoe_plugin.cli.models import demo_gguf

        gguf_path = str(demo_gguf(args.demo or FORMS[0]))
        if args.demo is None:
            notice("no --model_path and no --gguf_path given: this is the demo model")
    model, tokenizer = load_model(
        model_path,
        gguf_path,
        args.optimize_config_path,
        dtype=None if args.dtype == "auto" else args.dtype,
        trust_rules=args.trust_rules,
        progress=sys.stderr.isatty(),
        **settings,
    )
    if tokenizer is None:
        raise ConfigError(
            "the GGUF holds no tokenizer that can be used: give --model_path with the model's "
            "tokenizer"
        )
    return model, tokenizer


def _talk(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    sampling: dict[str, Any],
    prompt: str | None,
    records: Records,
) -> int:
    import torch

    from hybrimoe_plugin.cli.chat import Chat, ChatOptions
    from hybrimoe_plugin.cli.report import EngineReport

    if args.seed is not None:
        torch.manual_seed(args.seed)
    records.attach(model)
    piece = args.chunk_prefill_size or (CPU_PIECE if _on_cpu_alone(model) else PIECE)
    options = ChatOptions(args.max_new_tokens, sampling, args.force_think, piece, args.sampler)
    return _converse(args, Chat(model, tokenizer, options, EngineReport(model)), prompt)


def _on_cpu_alone(model: Any) -> bool:
    """Whether no accelerator computes: there, many pieces would send the same experts many
    times.
    """
    engines = getattr(getattr(model, "hybrimoe", None), "engines", ())
    return bool(engines) and all(engine.accelerator is None for engine in engines)


def _talk_flash(
    args: argparse.Namespace, settings: dict[str, Any], sampling: dict[str, Any], prompt: str | None
) -> int:
    import torch
    from transformers.utils import logging as transformers_logging

    from hybrimoe_plugin.cli.chat import Chat, ChatOptions

    if settings or args.timeline or args.record_trace:
        raise ConfigError(
            "a target on flash has no engine: leave the engine's and the records' flags out"
        )
    if not args.verbose:
        transformers_logging.set_verbosity_error()
    flash = find_module(FLASH_CHAT).load(args)
    try:
        if args.seed is not None:
            torch.manual_seed(args.seed)
        options = ChatOptions(args.max_new_tokens, sampling, args.force_think)
        return _converse(
            args,
            Chat(flash.target.model, flash.tokenizer, options, flash.report, flash.decoder),
            prompt,
        )
    finally:
        flash.close()


def _converse(args: argparse.Namespace, chat: Any, prompt: str | None) -> int:
    from hybrimoe_plugin.cli.chat import HELP

    if prompt is not None:
        return 0 if chat.answer(prompt) else 130
    if sys.stdin.isatty():
        _edit_lines()
        notice(HELP)
    chat.loop(input, args.prompt_file)
    return 0


def _edit_lines() -> None:
    """Give `input` history and cursor keys where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
