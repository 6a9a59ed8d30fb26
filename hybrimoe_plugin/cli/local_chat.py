"""`hybrimoe local_chat`: the flags of `ktransformers.local_chat`, and those of the engine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybrimoe_plugin.cli.chat import effects, flags
from hybrimoe_plugin.cli.chat.records import Records
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import Parser
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.cli.main import FLASH_CHAT, INTERRUPTED, find_module
from hybrimoe_plugin.cli.reading import read_prompt_file, well_formed
from hybrimoe_plugin.cli.setting_flags import add_settings, given_settings
from hybrimoe_plugin.config import DEMO_FORMS
from hybrimoe_plugin.device.choice import placed
from hybrimoe_plugin.errors import ConfigError

COMMON = (
    *("gguf_path", "model_path", "rules", "demo", "device"),
    *("prompt", "prompt_file", "max_new_tokens", "greedy", "temperature", "top_p", "seed"),
    *("cache_ratio", "cache_bytes", "cpu_threads", "context"),
    *("scheduler", "cache", "prefetch"),
    *("flash_pack", "draft", "dram_budget"),
)
"""Flags that most people need: `--help` shows these, `--help_all` shows all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; without a model the chat is with the demo model."""
    parser.usage = "%(prog)s [--gguf_path PATH] [--prompt TEXT] [flags]"
    if isinstance(parser, Parser):
        parser.synonyms = flags.SYNONYMS
    flags.add_model_choice(parser)
    flags.add_answers(parser.add_argument_group("answers"))
    add_settings(parser)
    find_module(FLASH_CHAT).add_arguments(parser)
    flags.add_records(parser.add_argument_group("records"))
    flags.add_foreign(parser.add_argument_group("flags of ktransformers.local_chat"))


def run(args: argparse.Namespace) -> int:
    """Load the model, then answer one prompt or talk until /exit."""
    flash = find_module(FLASH_CHAT)
    asked = effects.Asked(args, flash.is_selected(args))
    settings = _settings(args)
    idle = (*flash.IDLE, *effects.IDLE)
    effects.refuse_idle(asked, idle)
    if not asked.flash:
        settings = placed(settings, args.device)
    sampling = flags.sampling(args)
    prompt = _one_shot(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_libraries()
    _check_machine(asked, settings, idle)
    flags.fill_in(args)
    if asked.flash:
        return _talk_flash(args, sampling, prompt)
    with Records(args.timeline, args.record_trace) as records:
        model, tokenizer = _load(args, settings)
        return _talk(args, model, tokenizer, sampling, prompt, records)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings, also those that have kTransformers' names."""
    settings = given_settings(args)
    if args.cpu_infer is not None:
        _same_as(settings, "cpu_threads", args.cpu_infer, f"--cpu_infer {args.cpu_infer}")
    if args.use_cuda_graph is not None:
        graphs = "auto" if args.use_cuda_graph else "off"
        _same_as(settings, "graphs", graphs, f"--use_cuda_graph {args.use_cuda_graph}")
    return settings


def _same_as(settings: dict[str, Any], name: str, value: Any, typed: str) -> None:
    """Set what a flag of kTransformers asks for. Raises: ConfigError: ours asks for another."""
    found = settings.setdefault(name, value)
    if found != value:
        raise ConfigError(f"{typed} and --{name} {found} differ: give one of them")


def _check_machine(
    asked: effects.Asked, settings: dict[str, Any], idle: Sequence[effects.Idle]
) -> None:
    """Refuse what this machine does not have, before anything is built or read.

    Raises:
        BackendError: there is no such device.
        ConfigError: flags that would need one.
    """
    from hybrimoe_plugin.device.machine import cuda_device, cuda_refusal

    device = asked.args.device
    if device is None and settings.get("accelerator") == "cuda":
        device = "cuda"
    if device is not None and device.startswith("cuda"):
        cuda_device(device)
    effects.refuse_idle(replace(asked, no_cuda=cuda_refusal()), idle)


def _one_shot(args: argparse.Namespace) -> str | None:
    """The only prompt to answer; None begins a conversation."""
    if args.prompt_file is not None:
        # Read now, so that a missing file is found before the model is loaded.
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
    """(model, tokenizer)."""
    from transformers.utils import logging as transformers_logging

    from hybrimoe_plugin.hosts.transformers import load_model

    if not args.verbose:
        transformers_logging.set_verbosity_error()
    gguf_path = args.gguf_path
    if args.model_path is None and gguf_path is None:
        gguf_path = _demo(args.demo)
    model, tokenizer = load_model(
        args.model_path,
        gguf_path,
        args.optimize_config_path,
        dtype=None if args.dtype == "auto" else args.dtype,
        trust_rules=args.trust_rules,
        progress=sys.stderr.isatty(),
        **settings,
    )
    if tokenizer is None:
        raise ConfigError(
            "the GGUF file holds no usable tokenizer: give --model_path with the model's tokenizer"
        )
    return model, tokenizer


def _demo(form: str | None) -> str:
    from hybrimoe_plugin.cli.models import demo_gguf

    if form is None:
        notice("no --model_path and no --gguf_path given: this is the demo model")
        form = DEMO_FORMS[0]
    return str(demo_gguf(form))


def _talk(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    sampling: dict[str, Any],
    prompt: str | None,
    records: Records,
) -> int:
    import torch

    from hybrimoe_plugin.cli.chat.conversation import Chat, ChatOptions
    from hybrimoe_plugin.cli.chat.report import EngineReport

    if args.seed is not None:
        torch.manual_seed(args.seed)
    records.attach(model)
    piece = args.chunk_prefill_size
    if piece is None:
        piece = flags.CPU_PIECE if _on_cpu_alone(model) else flags.PIECE
    options = ChatOptions(args.max_new_tokens, sampling, args.force_think, piece, args.sampler)
    chat = Chat(model, tokenizer, options, EngineReport(model))
    return _converse(args, chat, prompt)


def _on_cpu_alone(model: Any) -> bool:
    """Whether only the CPU computes; an accelerator would be sent the experts for every piece."""
    engines = getattr(getattr(model, "hybrimoe", None), "engines", ())
    return bool(engines) and all(engine.accelerator is None for engine in engines)


def _talk_flash(args: argparse.Namespace, sampling: dict[str, Any], prompt: str | None) -> int:
    import torch
    from transformers.utils import logging as transformers_logging

    from hybrimoe_plugin.cli.chat.conversation import Chat, ChatOptions

    if not args.verbose:
        transformers_logging.set_verbosity_error()
    flash = find_module(FLASH_CHAT).load(args)
    try:
        if args.seed is not None:
            torch.manual_seed(args.seed)
        options = ChatOptions(args.max_new_tokens, sampling, args.force_think)
        model = flash.target.model
        chat = Chat(model, flash.tokenizer, options, flash.report, flash.decoder)
        return _converse(args, chat, prompt)
    finally:
        flash.close()


def _converse(args: argparse.Namespace, chat: Any, prompt: str | None) -> int:
    from hybrimoe_plugin.cli.chat.conversation import HELP

    if prompt is not None:
        return 0 if chat.answer(prompt) else INTERRUPTED
    if sys.stdin.isatty():
        _edit_lines()
        notice(HELP)
    chat.loop(input, args.prompt_file)
    return 0


def _edit_lines() -> None:
    """Give `input` history and cursor keys where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
