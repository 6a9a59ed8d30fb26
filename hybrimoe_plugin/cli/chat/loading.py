"""From flags to a loaded model: what a chat and the server have in common.

In this order: `chosen`, `announce`, `check_machine`, `load`, so that what can be refused is
refused before libraries are imported, and what needs no weights before they are read.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cli.chat import effects, flags
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.imports import import_libraries
from hybrimoe_plugin.cli.main import FLASH_CHAT, find_module
from hybrimoe_plugin.cli.setting_flags import given_settings
from hybrimoe_plugin.config import DEMO_FORMS
from hybrimoe_plugin.device.choice import placed
from hybrimoe_plugin.errors import ConfigError, HybriMoEError


@dataclass(frozen=True)
class Chosen:
    """What the flags ask for, as far as it can be checked without the machine.

    Attributes:
        settings: of the engine.
        idle: flags that may have no effect, beside these.
    """

    asked: effects.Asked
    settings: dict[str, Any]
    idle: Sequence[effects.Idle]

    @property
    def flash(self) -> bool:
        """Whether the model is a target on flash."""
        return self.asked.flash


def chosen(args: argparse.Namespace) -> Chosen:
    """Read the flags of model and engine.

    Raises:
        ConfigError: flags without effect, values out of range, or two that exclude each other.
    """
    flash = find_module(FLASH_CHAT)
    asked = effects.Asked(args, flash.is_selected(args))
    settings = _settings(args)
    idle = (*flash.IDLE, *effects.IDLE)
    effects.refuse_idle(asked, idle)
    if not asked.flash:
        settings = placed(settings, args.device)
    return Chosen(asked, settings, idle)


def be_quiet(args: argparse.Namespace) -> None:
    """Let only errors be logged, if the user wants to see answers alone."""
    if args.quiet:
        for package in ("hybrimoe_plugin", "lever_ext"):
            logging.getLogger(package).setLevel(logging.ERROR)


def announce(args: argparse.Namespace) -> None:
    """Say what is loaded, if somebody waits: called before seconds of imports."""
    if is_watched(args):
        notice(f"loading {_model_name(args)} ...")


def _model_name(args: argparse.Namespace) -> str:
    """What the flags name, without its folder."""
    hub_name = getattr(args, "hub_name", None)
    named = args.flash_pack or args.gguf_path or args.model_path
    if named is None:
        return "the demo model"
    return hub_name or os.path.basename(os.path.abspath(named))


def check_machine(choice: Chosen) -> None:
    """Import the libraries; refuse what this machine does not have. Mutates the flags: defaults.

    Raises:
        BackendError: there is no such device.
        ConfigError: flags that would need one.
    """
    args = choice.asked.args
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_libraries()

    from hybrimoe_plugin.device.machine import cuda_device, cuda_refusal

    device = args.device
    if device is None and choice.settings.get("accelerator") == "cuda":
        device = "cuda"
    if device is not None and device.startswith("cuda"):
        cuda_device(device)
    effects.refuse_idle(replace(choice.asked, no_cuda=cuda_refusal()), choice.idle)
    flags.fill_in(args)
    _be_plain(args)


def is_watched(args: argparse.Namespace) -> bool:
    """Whether somebody waits at a terminal and wants to know for what."""
    return not args.quiet and sys.stderr is not None and sys.stderr.isatty()


def sources(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """(directory with config.json or None, GGUF or None): the demo model without either."""
    gguf_path = args.gguf_path
    if args.model_path is None and gguf_path is None:
        gguf_path = _demo(args.demo, args.quiet)
    return args.model_path, gguf_path


def context(model_path: str | None, gguf_path: str | None) -> int | None:
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


def load(
    args: argparse.Namespace, files: tuple[str | None, str | None], settings: dict[str, Any]
) -> tuple[Any, Any]:
    """(model, tokenizer).

    Args:
        files: of `sources`.

    Raises:
        HybriMoEError: one of its kinds, with what to do.
    """
    from hybrimoe_plugin.hosts.transformers import load_model

    return load_model(
        *files,
        args.optimize_config_path,
        dtype=None if args.dtype == "auto" else args.dtype,
        trust_rules=args.trust_rules,
        progress=is_watched(args),
        require_tokenizer=True,
        **settings,
    )


def load_flash(args: argparse.Namespace) -> Any:
    """A target on flash with tokenizer and decoder (`lever_ext.cli.chat.FlashChat`).

    The caller closes it.

    Raises:
        HybriMoEError: one of its kinds, with what to do.
    """
    return find_module(FLASH_CHAT).load(args)


def piece(args: argparse.Namespace, model: Any) -> int:
    """Tokens of a prompt that are computed at once."""
    from hybrimoe_plugin.cli.chat.report import on_cpu_alone

    given: int | None = args.chunk_prefill_size
    if given is not None:
        return given
    # An accelerator would be sent the experts for every piece.
    return flags.CPU_PIECE if on_cpu_alone(model.hybrimoe) else flags.PIECE


def _be_plain(args: argparse.Namespace) -> None:
    """Let transformers say errors alone, unless details are asked for."""
    from transformers.utils import logging as transformers_logging

    if not args.verbose:
        transformers_logging.set_verbosity_error()


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


def _demo(form: str | None, quiet: bool) -> str:
    from hybrimoe_plugin.cli.models import demo_gguf

    if form is None:
        if not quiet:
            notice("no --model_path and no --gguf_path given: this is the demo model")
        form = DEMO_FORMS[0]
    return str(demo_gguf(form))
