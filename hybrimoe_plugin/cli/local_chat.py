"""`hybrimoe local_chat`: the flags of `ktransformers.local_chat`, and those of the engine."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cli.chat import effects, flags
from hybrimoe_plugin.cli.chat.records import Records
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import Parser
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.cli.main import FLASH_CHAT, INTERRUPTED, find_module
from hybrimoe_plugin.cli.reading import read_prompt_file, well_formed
from hybrimoe_plugin.cli.setting_flags import add_settings, given_settings
from hybrimoe_plugin.config import DEMO_FORMS, parse_bytes
from hybrimoe_plugin.device.choice import placed
from hybrimoe_plugin.errors import ConfigError, HybriMoEError
from hybrimoe_plugin.files import printable

COMMON = (
    *("gguf_path", "model_path", "rules", "demo", "device"),
    *("prompt", "prompt_file", "max_new_tokens", "greedy", "temperature", "top_p", "seed"),
    *("system", "stop", "quiet"),
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
    _be_quiet(args)
    flash = find_module(FLASH_CHAT)
    asked = effects.Asked(args, flash.is_selected(args))
    settings = _settings(args)
    idle = (*flash.IDLE, *effects.IDLE)
    effects.refuse_idle(asked, idle)
    if not asked.flash:
        settings = placed(settings, args.device)
    flags.sampling(args)  # refuses contradictions now
    system = well_formed(args.system or "")
    prompt = _one_shot(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if _is_watched(args):
        notice("loading libraries ...")
    import_libraries()
    _check_machine(asked, settings, idle)
    flags.fill_in(args)
    if asked.flash:
        return _talk_flash(args, system, prompt)
    with Records(args.timeline, args.record_trace, args.quiet) as records:
        model, tokenizer = _load(args, settings)
        return _talk(args, model, tokenizer, system, prompt, records)


def _be_quiet(args: argparse.Namespace) -> None:
    """Let only errors be logged, if the user wants to see answers alone."""
    if args.quiet:
        for package in ("hybrimoe_plugin", "lever_ext"):
            logging.getLogger(package).setLevel(logging.ERROR)


def _is_watched(args: argparse.Namespace) -> bool:
    """Whether somebody waits at a terminal and wants to know for what."""
    return not args.quiet and sys.stderr is not None and sys.stderr.isatty()


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

    from hybrimoe_plugin.cli.chat.options import check_length
    from hybrimoe_plugin.hosts.transformers import load_model

    if not args.verbose:
        transformers_logging.set_verbosity_error()
    gguf_path = args.gguf_path
    if args.model_path is None and gguf_path is None:
        gguf_path = _demo(args.demo, args.quiet)
    check_length(args.max_new_tokens, _context(args.model_path, gguf_path))
    return load_model(
        args.model_path,
        gguf_path,
        args.optimize_config_path,
        dtype=None if args.dtype == "auto" else args.dtype,
        trust_rules=args.trust_rules,
        progress=_is_watched(args),
        require_tokenizer=True,
        **settings,
    )


def _context(model_path: str | None, gguf_path: str | None) -> int | None:
    """Tokens that the model can take, read before minutes of loading.

    None where a config.json, which is read while loading, or no file says so.
    """
    from hybrimoe_plugin.families.description import describe
    from hybrimoe_plugin.weights.gguf_store import GGUFStore

    path = gguf_path or model_path
    if path is None or (model_path is not None and Path(model_path, "config.json").exists()):
        return None
    try:
        config = describe(GGUFStore.open(path)).config()
    except HybriMoEError:  # loading says what is wrong
        return None
    return getattr(config, "max_position_embeddings", None)


def _demo(form: str | None, quiet: bool) -> str:
    from hybrimoe_plugin.cli.models import demo_gguf

    if form is None:
        if not quiet:
            notice("no --model_path and no --gguf_path given: this is the demo model")
        form = DEMO_FORMS[0]
    return str(demo_gguf(form))


def _talk(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    system: str,
    prompt: str | None,
    records: Records,
) -> int:
    from hybrimoe_plugin.cli.chat.conversation import Chat
    from hybrimoe_plugin.cli.chat.options import options_of
    from hybrimoe_plugin.cli.chat.report import EngineReport, on_cpu_alone
    from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache

    _seed(args)
    records.attach(model)
    piece = args.chunk_prefill_size
    if piece is None:
        # An accelerator would be sent the experts for every piece.
        piece = flags.CPU_PIECE if on_cpu_alone(model.hybrimoe) else flags.PIECE
    report = EngineReport(model)
    options = options_of(args, piece)
    kept = KeptCache(model, parse_bytes(args.prefix_cache_bytes))
    chat = Chat(model, tokenizer, options, report, kept=kept)
    chat.system = system
    if prompt is not None:
        return _answer(chat, prompt)

    from hybrimoe_plugin.cli.chat.banner import banner

    return _converse(args, chat, lambda: banner(model), report.facts)


def _talk_flash(args: argparse.Namespace, system: str, prompt: str | None) -> int:
    from transformers.utils import logging as transformers_logging

    from hybrimoe_plugin.cli.chat.conversation import Chat
    from hybrimoe_plugin.cli.chat.options import options_of
    from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache

    if not args.verbose:
        transformers_logging.set_verbosity_error()
    flash = find_module(FLASH_CHAT).load(args)
    try:
        _seed(args)
        model = flash.target.model
        options = options_of(args, None)
        kept = KeptCache(model, parse_bytes(args.prefix_cache_bytes))
        chat = Chat(model, flash.tokenizer, options, flash.report, flash.decoder, kept=kept)
        chat.system = system
        if prompt is not None:
            return _answer(chat, prompt)
        return _converse(args, chat, flash.banner, list)
    finally:
        flash.close()


def _seed(args: argparse.Namespace) -> None:
    import torch

    if args.seed is not None:
        torch.manual_seed(args.seed)


def _answer(chat: Any, prompt: str) -> int:
    return 0 if chat.answer(prompt) else INTERRUPTED


def _converse(
    args: argparse.Namespace,
    chat: Any,
    banner: Callable[[], list[str]],
    facts: Callable[[], list[str]],
) -> int:
    """Talk, with an editor where somebody types.

    Args:
        banner: gives the lines before the conversation.
        facts: gives more lines for `/stats`.
    """
    from hybrimoe_plugin.cli.chat.typed import loop, terminal
    from hybrimoe_plugin.cli.chat.typed.session import Session

    session = Session(chat, args, facts, args.prompt_file)
    if not args.quiet:
        # Names of files and models are the banner's, and come from outside.
        print(*map(printable, banner()), sep="\n", file=sys.stderr, flush=True)
    if not terminal.is_terminal():
        return loop.converse(session, lambda _prompt: input())
    if not args.quiet:
        notice("/help lists the commands, /exit leaves")
    return loop.converse(session, terminal.editor(), is_editor=True)
