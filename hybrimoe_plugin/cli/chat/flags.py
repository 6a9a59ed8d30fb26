"""Flags of chat and server that are neither the engine's nor those for targets on flash."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from hybrimoe_plugin.cli.flags import (
    add_chat_flag,
    add_flag,
    add_model,
    add_switch,
    device,
    number,
    size,
    whole,
)
from hybrimoe_plugin.cli.reading import well_formed
from hybrimoe_plugin.config import COLDEST_TEMPERATURE, DTYPES, SAMPLERS, Settings
from hybrimoe_plugin.errors import ConfigError

PIECE = 8192
"""Tokens of a prompt that are computed at once."""
CPU_PIECE = 512
"""The same where only the CPU computes: Ctrl-C waits for the piece to end."""

PREFIX_CACHE = "1GiB"
"""Kept of conversations beside the present one."""

_THREADS = next(item.metadata for item in fields(Settings) if item.name == "cpu_threads")

MODES = ("normal", "long_context")
"""Of ktransformers.local_chat."""

SYNONYMS = {
    "c": "context",
    "ctx_size": "context",
    "m": "gguf_path",
    "max_tokens": "max_new_tokens",
    "model": "gguf_path",
    "n": "max_new_tokens",
    "n_gpu_layers": "cache_ratio",
    "n_predict": "max_new_tokens",
    "ngl": "cache_ratio",
    "p": "prompt",
    "t": "cpu_threads",
    "temp": "temperature",
    "threads": "cpu_threads",
}
"""Flags of llama.cpp and others -> ours."""

_UNLESS_GIVEN = {
    "dtype": "auto",
    "sampler": "auto",
    "trust_rules": False,
    "greedy": False,
    "prefix_cache_bytes": PREFIX_CACHE,
}
"""Flags that are None until `fill_in`, so that one that was typed can be told from one that was
not.
"""

_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Values that mean nothing to greedy decoding are cleared, or transformers warns about them."""


def add_model_choice(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what to chat with."""
    group = add_model(parser)
    add_flag(
        group,
        "rules",
        dest="optimize_config_path",
        metavar="YAML",
        help="rules file, or name of packaged rules; default: by model family",
    )
    add_switch(group, "trust_rules", "let the rules import classes from any package", None)
    add_chat_flag(group, "demo")
    add_flag(
        group,
        "device",
        type=device,
        metavar="DEVICE",
        help="where to compute: cuda, cuda:N, cpu, or emulated (an accelerator emulated on the "
        "CPU); default: CUDA if there is any, but cpu with a target on flash",
    )
    add_flag(
        group,
        "dtype",
        choices=("auto", *DTYPES),
        help="type of activations and dequantised weights; not of the experts (default auto)",
    )


def add_answers(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what to answer, and how."""
    add_chat_flag(group, "prompt")
    add_chat_flag(group, "prompt_file")
    add_flag(group, "system", metavar="TEXT", help="system prompt of the conversation")
    add_chat_flag(group, "max_new_tokens")
    add_switch(
        group,
        "do_sample",
        "sample tokens; False is the same as --greedy; default: as the model's generation config "
        "says",
        None,
    )
    add_switch(group, "greedy", "take the likeliest token every time", None)
    add_flag(
        group,
        "temperature",
        type=number(0, 100),
        metavar="0..100",
        help="sampling temperature; 0 is greedy",
    )
    add_flag(
        group,
        "top_p",
        type=number(0, 1),
        metavar="0..1",
        help="sample from the likeliest tokens with this share of probability",
    )
    add_flag(
        group, "top_k", type=whole(1), metavar="N", help="sample from this many likeliest tokens"
    )
    add_flag(
        group,
        "min_p",
        type=number(0, 1),
        metavar="0..1",
        help="sample from tokens at least this share as likely as the likeliest",
    )
    add_flag(
        group,
        "repetition_penalty",
        type=number(0.01, 100),
        metavar="0.01..100",
        help="above 1: tokens that were there already become less likely",
    )
    add_flag(
        group,
        "stop",
        action="append",
        type=some_text,
        metavar="TEXT",
        help="end an answer before this text; may be given several times",
    )
    add_switch(group, "quiet", "print answers and errors alone")
    add_flag(
        group,
        "sampler",
        choices=SAMPLERS,
        help="code that filters tokens: flashinfer where it is faster, or transformers "
        "(default auto)",
    )
    add_chat_flag(group, "seed")
    add_switch(group, "force_think", "begin every answer with <think>")
    add_piece(group)
    add_prefix_cache(group)


def add_piece(group: argparse._ArgumentGroup) -> None:
    """Add the flag for the pieces of long prompts."""
    add_flag(
        group,
        "chunk_prefill_size",
        type=whole(1),
        metavar="N",
        help="compute longer prompts in pieces of this many tokens "
        f"(default {PIECE}, or {CPU_PIECE} where only the CPU computes)",
    )


def add_prefix_cache(group: argparse._ArgumentGroup) -> None:
    """Add the flag for conversations that may come back."""
    add_flag(
        group,
        "prefix_cache_bytes",
        type=size,
        metavar="BYTES",
        help="main memory for what was computed of conversations that you left, which may come "
        f"back; 0 keeps the present one alone (default {PREFIX_CACHE})",
    )


def some_text(text: str) -> str:
    """Reader of texts that are not empty."""
    try:
        known = well_formed(text)
    except ConfigError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, found {text!r}") from None
    if not known:
        raise argparse.ArgumentTypeError("expected a text, found none")
    return known


def add_records(group: argparse._ArgumentGroup) -> None:
    """Add the flags for files that a run writes."""
    add_flag(
        group,
        "timeline",
        metavar="FILE",
        help="write a trace of the run for Perfetto or chrome://tracing",
    )
    add_flag(
        group,
        "record_trace",
        metavar="FILE",
        help="write a trace of the routing for the replay simulator",
    )


def add_foreign(group: argparse._ArgumentGroup) -> None:
    """Add the flags of ktransformers.local_chat that have another name here."""
    add_flag(
        group,
        "optimize_config_path",
        "optimize_rule_path",
        metavar="YAML",
        help="the same as --rules",
    )
    add_flag(
        group,
        "cpu_infer",
        type=whole(_THREADS["low"], _THREADS["high"]),
        metavar="N",
        help="the same as --cpu_threads",
    )
    add_switch(group, "use_cuda_graph", "the same as --graphs: True is auto, False is off", None)
    add_flag(
        group,
        "mode",
        choices=MODES,
        help="normal changes nothing; long_context is refused, as long contexts need no mode",
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags change in the model's generation config.

    Raises:
        ConfigError: flags that contradict each other.
    """
    greedy = asks_for_greedy(args)
    if greedy is not None and args.do_sample:
        raise ConfigError(f"{greedy} and --do_sample exclude each other: give one of them")
    penalty = args.repetition_penalty
    given: dict[str, Any] = {} if penalty is None else {"repetition_penalty": penalty}
    if greedy is not None:
        return {**_GREEDY, **given}
    filters = {}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        value = getattr(args, name)
        if value is not None:
            filters[name] = value
    if filters or args.do_sample:
        filters["do_sample"] = True
    return {**filters, **given}


def asks_for_greedy(args: argparse.Namespace) -> str | None:
    """The flag that asks for the likeliest token every time, as it was typed; None without one."""
    if args.greedy:
        return "--greedy"
    if args.do_sample is False:
        return "--do_sample False"
    if args.temperature is not None and args.temperature < COLDEST_TEMPERATURE:
        return f"--temperature {args.temperature:g}"
    return None


def fill_in(args: argparse.Namespace) -> None:
    """Give the flags that were left out their defaults. Mutates."""
    for name, value in _UNLESS_GIVEN.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
