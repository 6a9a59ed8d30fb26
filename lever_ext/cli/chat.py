"""The part of `hybrimoe local_chat` for targets on flash: loading, the report; flags elsewhere."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.errors import ConfigError, SpeculationError
from lever_ext.cli.chat_flags import IDLE, add_arguments, draft_name, is_selected

if TYPE_CHECKING:
    from lever_ext.decoding import LeverDecoding
    from lever_ext.target import FlashTarget

__all__ = ["IDLE", "FlashChat", "add_arguments", "is_selected", "load"]


@dataclass(frozen=True)
class FlashChat:
    """A loaded target with the tokenizer and the decoder of its answers."""

    target: FlashTarget
    tokenizer: Any
    decoder: LeverDecoding
    device_gbps: float
    """Bandwidth of plain direct reads of the pack."""

    def report(self) -> str | None:
        """Statistics of the last answer's speculation; None before the first answer."""
        stats = self.decoder.stats
        if not stats.tokens:
            return None
        return "\n".join(stats.lines(self.device_gbps))

    def banner(self) -> list[str]:
        """The lines before a conversation."""
        from hybrimoe_plugin.cli.chat.banner import machine
        from hybrimoe_plugin.device.memory import human

        pack, kept = self.target.pack, self.target.residency.nbytes
        draft = "none" if self.decoder.draft is None else self.decoder.draft.name
        return [
            f"{self.target.model.config.model_type}, {pack.path}",
            f"weights: {human(pack.reader.size)} on flash, {human(kept)} of memory for them; "
            f"draft {draft}, tree {self.decoder.policy.name}",
            machine(self.target.model),
        ]

    def close(self) -> None:
        self.decoder.close()
        self.target.close()


def load(args: argparse.Namespace) -> FlashChat:
    """Open the target and make its draft.

    Raises:
        HybriMoEError: one of its kinds, with what to do.
    """
    from lever_ext.flash.reader import Throttle
    from lever_ext.target import load_target
    from lever_ext.tree.policies import make_policy

    _check_before_work(args)
    policy = make_policy(args.tree or "lever", args.tree_size)
    throttle = None if args.throttle is None else Throttle.parse(args.throttle)
    pack = _demo_pack(args.demo, args.quiet) if args.flash_pack is None else args.flash_pack
    target = load_target(
        pack,
        dram_budget=args.dram_budget,
        rules=args.optimize_config_path,
        throttle=throttle,
        trust_rules=args.trust_rules,
        device=args.device or "cpu",
        vram_budget=args.vram_budget,
    )
    try:
        return _chat_with(target, pack, policy, args)
    except BaseException:
        target.close()
        raise


def _check_before_work(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a demo target is packed or a pack is read.

    Raises:
        ConfigError, SpeculationError: no memory is named for the device, or there is no such draft
            or predictor.
    """
    from lever_ext.drafts.make import check_name

    if args.device == "emulated" and args.vram_budget is None:
        raise ConfigError(
            "--device emulated has no memory of its own: give --vram_budget too, to say how much "
            "it may take"
        )
    check_name(draft_name(args))
    if args.early_exit is not None and not Path(args.early_exit).is_file():
        raise SpeculationError(
            f"--early_exit {args.early_exit}: there is no early-exit predictor of this name; "
            "hybrimoe lever_train makes one"
        )


def _chat_with(target: FlashTarget, pack: Any, policy: Any, args: argparse.Namespace) -> FlashChat:
    """The chat with an open target; the caller closes the target if this raises."""
    from lever_ext.decoding import LeverDecoding
    from lever_ext.flash.reader import plain_gbps
    from lever_ext.packing import pack_tokenizer
    from lever_ext.tree.policies import make_policy

    if not args.quiet and target.split is not None and target.accelerator is not None:
        notice(target.split.line(target.accelerator.label))
    tokenizer = pack_tokenizer(pack)
    target.stop_as(tokenizer)
    name = draft_name(args)
    if name == "none":
        policy = make_policy("none")
    draft = _draft(name, target, tokenizer, args)
    if args.early_exit is not None:
        target.load_gate(args.early_exit)
    decoder = LeverDecoding(draft, policy, target, overlap=args.overlap is not False)
    return FlashChat(target, tokenizer, decoder, plain_gbps(target.pack.path))


def _draft(name: str, target: FlashTarget, tokenizer: Any, args: argparse.Namespace) -> Any:
    """The draft of that name; the demo targets have a low-bit draft of their own."""
    from lever_ext.drafts.make import BITS, make_draft
    from lever_ext.speculation.verify import takes_trees

    if not takes_trees(target.model):
        return None  # LeverDecoding says so, and no copy is made in vain
    if name == "low-bit" and args.flash_pack is None:
        return _demo_draft(args.quiet)
    return make_draft(name, target, tokenizer, args.draft_bits or BITS)


def _demo_pack(form: str | None, quiet: bool) -> Path:
    """The demo target: a dense one, or the MoE that --demo names; packed on first use."""
    from hybrimoe_plugin.cache_folder import found, place_for
    from hybrimoe_plugin.cli.models import demo_gguf
    from hybrimoe_plugin.demo import source_path
    from hybrimoe_plugin.hosts.transformers.tokenizer import has_tokenizer
    from lever_ext.cli.progress import packing_bar
    from lever_ext.demo import widened_pack
    from lever_ext.packing import pack_model

    if not quiet:
        suffix = "" if form is None else f" in {form} form"
        notice(f"no --flash_pack given: this is the demo target{suffix}")
    file = f"lever/{'dense' if form is None else form}/target.lever"
    kept = found(file)
    # Without a tokenizer, packing was cut off at its end.
    if kept is not None and has_tokenizer(kept.parent):
        return kept.parent
    # Size 0: the packer checks the free space itself, and resumes an interrupted pack.
    directory = place_for(file, 0).parent
    with packing_bar(quiet) as bar:
        if form is None:
            widened_pack(source_path(), directory, progress=bar)
        else:
            pack_model(directory, None, demo_gguf(form), progress=bar)
    return directory


def _demo_draft(quiet: bool) -> Any:
    from hybrimoe_plugin.demo import source_path
    from lever_ext.demo import demo_draft

    if not quiet:
        notice("the draft is a low-bit copy of SmolLM2, which the demo targets were made from")
    return demo_draft(source_path())
