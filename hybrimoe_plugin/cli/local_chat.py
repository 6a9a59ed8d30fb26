"""`hybrimoe local_chat`: the flags of `ktransformers.local_chat`, and those of the engine."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from hybrimoe_plugin.cli.chat import flags
from hybrimoe_plugin.cli.chat.records import Records
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.cli.main import FLASH_CHAT, INTERRUPTED, find_module
from hybrimoe_plugin.cli.reading import read_prompt_file, well_formed
from hybrimoe_plugin.cli.setting_flags import add_settings, given_settings
from hybrimoe_plugin.config import DEMO_FORMS
from hybrimoe_plugin.errors import ConfigError

COMMON = (
    *("gguf_path", "model_path", "rules", "demo"),
    *("prompt", "prompt_file", "max_new_tokens", "greedy", "temperature", "top_p", "seed"),
    *("system", "stop", "quiet"),
    *("cache_ratio", "cache_bytes", "accelerator", "cpu_threads", "context"),
    *("scheduler", "cache", "prefetch"),
    *("flash_pack", "draft", "dram_budget", "device"),
)
"""Flags that most people need: `--help` shows these, `--help_all` shows all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; without a model the chat is with the demo model."""
    parser.usage = "%(prog)s [--gguf_path PATH] [--prompt TEXT] [flags]"
    flags.add_model_choice(parser)
    flags.add_answers(parser.add_argument_group("answers"))
    add_settings(parser)
    find_module(FLASH_CHAT).add_arguments(parser)
    flags.add_records(parser.add_argument_group("records"))
    flags.add_foreign(parser.add_argument_group("flags of ktransformers.local_chat"))


def run(args: argparse.Namespace) -> int:
    """Load the model, then answer one prompt or talk until /exit."""
    settings = _settings(args)
    flags.sampling(args)  # refuses contradictions now
    system = well_formed(args.system or "")
    _be_quiet(args)
    flags.explain_ignored(args)
    prompt = _one_shot(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if _is_watched(args):
        notice("loading libraries ...")
    import_libraries()
    if find_module(FLASH_CHAT).is_selected(args):
        return _talk_flash(args, settings, system, prompt)
    with Records(args.timeline, args.record_trace) as records:
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
    settings = given_settings(args)
    if args.cpu_infer is not None:
        threads = settings.setdefault("cpu_threads", args.cpu_infer)
        if threads != args.cpu_infer:
            raise ConfigError(
                f"--cpu_infer {args.cpu_infer} and --cpu_threads {threads} differ: give one"
            )
    if args.demo is not None and (args.model_path or args.gguf_path):
        raise ConfigError(
            "--demo names the demo model and --model_path or --gguf_path another one: give one of "
            "them"
        )
    return settings


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
        gguf_path = _demo(args.demo, args.quiet)
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
    chat = Chat(model, tokenizer, options, report, kept=KeptCache(model))
    chat.system = system
    if prompt is not None:
        return _answer(chat, prompt)

    from hybrimoe_plugin.cli.chat.banner import banner

    return _converse(args, chat, lambda: banner(model), report.facts)


def _talk_flash(
    args: argparse.Namespace, settings: dict[str, Any], system: str, prompt: str | None
) -> int:
    from transformers.utils import logging as transformers_logging

    from hybrimoe_plugin.cli.chat.conversation import Chat
    from hybrimoe_plugin.cli.chat.options import options_of
    from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache

    if settings or args.timeline or args.record_trace:
        raise ConfigError(
            "a target on flash has no engine: leave out the flags for the engine and for records"
        )
    if not args.verbose:
        transformers_logging.set_verbosity_error()
    flash = find_module(FLASH_CHAT).load(args)
    try:
        _seed(args)
        model = flash.target.model
        options = options_of(args, None)
        kept = KeptCache(model)
        chat = Chat(model, flash.tokenizer, options, flash.report, flash.decoder, kept)
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
        print(*banner(), sep="\n", file=sys.stderr, flush=True)
    if not terminal.is_terminal():
        return loop.converse(session, lambda _prompt: input())
    if not args.quiet:
        notice("/help lists the commands, /exit leaves")
    return loop.converse(session, terminal.editor(), is_editor=True)
