"""Flags of `local_chat` that have no effect beside the others: refused by name, before any work.

Each entry of a table names some flags and says when, and why, they are idle. The tables are `IDLE`
below and that of the module for targets on flash.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe_plugin.cli.chat.flags import asks_for_greedy
from hybrimoe_plugin.config import COLDEST_TEMPERATURE
from hybrimoe_plugin.errors import ConfigError

_SPELT = {"optimize_config_path": "rules"}
"""Where the result is stored -> the flag that people type."""


@dataclass(frozen=True)
class Asked:
    """What was typed, and what is known of the machine.

    Args:
        args: flags that were not typed are None there, or missing.
        flash: whether they select a target on flash.
        no_cuda: why there is no CUDA here; None where there is, and before that is known.
    """

    args: argparse.Namespace
    flash: bool
    no_cuda: str | None = None

    def value(self, name: str) -> Any:
        return getattr(self.args, name, None)

    def given(self, name: str) -> bool:
        return self.value(name) is not None


@dataclass(frozen=True)
class Idle:
    """Some flags, and what makes them idle.

    Args:
        flags: where their values are stored.
        why: the reason and what to do; None where the flags have an effect.
    """

    flags: tuple[str, ...]
    why: Callable[[Asked], str | None]


def refuse_idle(asked: Asked, table: Sequence[Idle]) -> None:
    """Raise ConfigError for the first entry with a flag that was typed and has no effect."""
    for entry in table:
        typed = [_SPELT.get(name, name) for name in entry.flags if asked.given(name)]
        if not typed:
            continue
        why = entry.why(asked)
        if why is not None:
            names = ", ".join(f"--{name}" for name in typed)
            verb = "has" if len(typed) == 1 else "have"
            raise ConfigError(f"{names} {verb} no effect: {why}")


def _demo(asked: Asked) -> str | None:
    if asked.given("model_path") or asked.given("gguf_path"):
        return "--model_path or --gguf_path names another model: give one of them"
    return None


def _trust(asked: Asked) -> str | None:
    if asked.given("optimize_config_path"):
        return None
    return "it is about rules of your own: give --rules FILE too, or leave it out"


def beside_prompt(asked: Asked) -> str | None:
    """Why what is for a conversation is idle beside a single prompt."""
    if not asked.given("prompt"):
        return None
    return 'a single --prompt is answered without it: write --prompt "$(cat FILE)" instead'


def _other_conversations(asked: Asked) -> str | None:
    if not asked.given("prompt"):
        return None
    return "a single --prompt leaves no conversation; leave it out"


def _mode(asked: Asked) -> str | None:
    if asked.value("mode") != "long_context":
        return None
    return "long contexts need no mode here; --context N keeps memory for N tokens"


def _temperature(asked: Asked) -> str | None:
    if asked.value("temperature") < COLDEST_TEMPERATURE:
        return None
    return _filters(asked)


def _filters(asked: Asked) -> str | None:
    flag = asks_for_greedy(asked.args)
    return None if flag is None else f"{flag} takes the likeliest token: leave one of them out"


def _randomness(asked: Asked) -> str | None:
    # A conversation can be set to sampling later.
    return _filters(asked) if asked.given("prompt") else None


def _cached_experts(asked: Asked) -> str | None:
    """Why no expert is cached."""
    reason = None if asked.flash else _without_accelerator(asked)
    return None if reason is None else f"{reason}; leave it out, or try --device emulated"


def _without_accelerator(asked: Asked) -> str | None:
    accelerator = asked.value("accelerator")
    if asked.value("device") == "cpu":
        return "with --device cpu there is no accelerator"
    if accelerator == "none":
        return "with --accelerator none there is no accelerator"
    # Rules of one's own may ask for an emulated one.
    chosen = asked.given("device") or asked.given("optimize_config_path")
    if asked.no_cuda is None or chosen or accelerator not in (None, "auto"):
        return None
    return f"there is no accelerator here ({asked.no_cuda})"


def _cuda_graphs(asked: Asked) -> str | None:
    if "emulated" in (asked.value("device"), asked.value("accelerator")):
        return "an emulated accelerator has no CUDA graphs; leave it out"
    if asked.value("graphs") == "off" or asked.value("use_cuda_graph") is False:
        return "graphs are off; leave one of them out"
    return None


def _looking_ahead(asked: Asked) -> str | None:
    if asked.value("prefetch") != "off":
        return None
    return "--prefetch off loads nothing ahead; leave one of them out"


def _mrs(asked: Asked) -> str | None:
    if asked.value("cache") == "mrs" or asked.given("optimize_config_path"):
        return None
    return "it is about the cache policy mrs: give --cache mrs too, or leave it out"


IDLE = (
    Idle(("demo",), _demo),
    Idle(("trust_rules",), _trust),
    Idle(("prompt_file",), beside_prompt),
    Idle(("prefix_cache_bytes",), _other_conversations),
    Idle(("mode",), _mode),
    Idle(("temperature",), _temperature),
    Idle(("top_p", "top_k", "min_p"), _filters),
    Idle(("sampler", "seed"), _randomness),
    Idle(
        (
            *("scheduler", "cache", "budget", "prefetch", "cache_ratio", "cache_bytes"),
            *("look_ahead", "mrs_alpha", "mrs_p", "kernels", "activations", "attention", "verify"),
        ),
        _cached_experts,
    ),
    Idle(("attention", "host_path"), _cuda_graphs),
    Idle(("look_ahead",), _looking_ahead),
    Idle(("mrs_alpha", "mrs_p"), _mrs),
)
"""For every chat."""
