"""`hybrimoe local_chat`: the flags of `ktransformers.local_chat`, and those of the engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from hybrimoe_plugin.cli.chat import flags, loading
from hybrimoe_plugin.cli.chat.records import Records
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import Parser
from hybrimoe_plugin.cli.main import FLASH_CHAT, INTERRUPTED, find_module
from hybrimoe_plugin.cli.reading import read_prompt_file, well_formed
from hybrimoe_plugin.cli.setting_flags import add_settings
from hybrimoe_plugin.config import parse_bytes
from hybrimoe_plugin.errors import ConfigError
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
    loading.be_quiet(args)
    choice = loading.chosen(args)
    flags.sampling(args)  # refuses contradictions now
    system = well_formed(args.system or "")
    prompt = _one_shot(args)
    loading.announce(args)
    loading.check_machine(choice)
    if choice.flash:
        return _talk_flash(args, system, prompt)
    with Records(args.timeline, args.record_trace, args.quiet) as records:
        model, tokenizer = _load(args, choice.settings)
        return _talk(args, model, tokenizer, system, prompt, records)


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
    from hybrimoe_plugin.cli.chat.options import check_length

    files = loading.sources(args)
    check_length(args.max_new_tokens, loading.context(*files))
    return loading.load(args, files, settings)


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
    from hybrimoe_plugin.cli.chat.report import EngineReport
    from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache

    _seed(args)
    records.attach(model)
    report = EngineReport(model)
    options = options_of(args, loading.piece(args, model))
    kept = KeptCache(model, parse_bytes(args.prefix_cache_bytes))
    chat = Chat(model, tokenizer, options, report, kept=kept)
    chat.system = system
    if prompt is not None:
        return _answer(chat, prompt)

    from hybrimoe_plugin.cli.chat.banner import banner
    from hybrimoe_plugin.cli.chat.typed import terminal
    from hybrimoe_plugin.cli.chat.warm_up import warm_up

    records_nothing = args.timeline is None and args.record_trace is None
    if records_nothing and terminal.is_terminal():  # a pipe's messages come at once
        warm_up(model)
    return _converse(args, chat, lambda: banner(model), report.facts)


def _talk_flash(args: argparse.Namespace, system: str, prompt: str | None) -> int:
    from hybrimoe_plugin.cli.chat.conversation import Chat
    from hybrimoe_plugin.cli.chat.options import options_of
    from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache

    flash = loading.load_flash(args)
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
