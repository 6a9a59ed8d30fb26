"""Flags of `hybrimoe local_chat` for targets on flash, and when they have no effect."""

from __future__ import annotations

import argparse
from dataclasses import fields

from hybrimoe_plugin.cli.chat.effects import Asked, Idle
from hybrimoe_plugin.cli.flags import add_flag, add_switch, size, whole
from hybrimoe_plugin.config import OLD_SETTINGS, Settings

TREES = ("lever", "greedy", "opt_tree", "specinfer", "fixed", "chain", "none")
SIZED = ("opt_tree", "fixed", "chain")
"""Trees of a size that the user may choose."""
SELECTING = ("flash_pack", "draft", "dram_budget", "tree", "early_exit")
"""Giving any of these flags selects a target on flash instead of a model with scheduled experts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a chat with a target on flash."""
    group = parser.add_argument_group("target on flash, with speculative decoding")
    add_flag(
        group,
        "flash_pack",
        metavar="DIR",
        help="pack that hybrimoe flash_pack made; default: the demo target's",
    )
    _add_draft(group)
    _add_memory(group)
    _add_trees(group)
    add_flag(
        group,
        "throttle",
        metavar="NAME|GB/s",
        help="slow reads down to ufs3.1, ufs4.0, nvme or a number of GB/s",
    )
    add_switch(
        group, "overlap", "draft for the next cycle while a pass waits for flash (default on)", None
    )


def _add_draft(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "draft",
        metavar="NAME|FILE",
        help="low-bit, ngram, none (no speculation) or a small model's GGUF (default low-bit)",
    )
    add_flag(
        group,
        "draft_bits",
        type=int,
        choices=(2, 3, 4),
        help="of the low-bit draft (default 3)",
    )


def _add_memory(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "dram_budget",
        type=size,
        metavar="BYTES",
        help="memory for the target's weights, e.g. 1GiB; default: no limit",
    )
    add_flag(
        group,
        "vram_budget",
        type=size,
        metavar="BYTES",
        help="memory of --device for the target's weights; default: what is free",
    )


def _add_trees(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "tree",
        choices=TREES,
        help="what is verified in one pass; none: no speculation (default lever)",
    )
    add_flag(
        group,
        "tree_size",
        type=whole(1),
        metavar="N",
        help=f"chain length or node budget, for the trees {', '.join(SIZED)}",
    )
    add_flag(
        group,
        "early_exit",
        metavar="FILE",
        help="prune trees with this predictor of hybrimoe lever_train",
    )


def is_selected(args: argparse.Namespace) -> bool:
    """Whether the flags ask for a target on flash."""
    return any(getattr(args, name) is not None for name in SELECTING)


def draft_name(args: argparse.Namespace) -> str:
    """The draft that the flags ask for."""
    name: str | None = args.draft
    if name is None:
        return "none" if args.tree == "none" else "low-bit"
    return name


def _selecting(asked: Asked) -> str:
    """The first flag that has selected the target."""
    typed = [name for name in SELECTING if asked.given(name)]
    return f"--{typed[0]}"


def _only_on_flash(asked: Asked) -> str | None:
    if asked.flash:
        return None
    return "it is for targets on flash: give --flash_pack DIR too, or leave it out"


def _vram(asked: Asked) -> str | None:
    if not asked.flash:
        return (
            "it is for targets on flash: give --flash_pack DIR too; for other models "
            "--cache_bytes limits what experts take of a GPU"
        )
    if asked.value("device") in (None, "cpu"):
        return "the target is computed on the CPU: give --device cuda too, or leave it out"
    return None


def _only_with_engine(asked: Asked) -> str | None:
    if not asked.flash:
        return None
    return f"{_selecting(asked)} selects a target on flash, which has no engine; leave it out"


def _own_decoding(asked: Asked) -> str | None:
    if not asked.flash:
        return None
    return f"{_selecting(asked)} selects a target on flash, which decodes by code of its own"


def _dtype(asked: Asked) -> str | None:
    if not asked.flash:
        return None
    return "a pack has the type that hybrimoe flash_pack --dtype gave it; leave it out"


def _other_model(asked: Asked) -> str | None:
    if not asked.flash:
        return None
    if asked.given("flash_pack"):
        return "--flash_pack names the model already; leave it out"
    return (
        f"{_selecting(asked)} selects a target on flash, which needs a pack: run hybrimoe "
        "flash_pack with the model, then give --flash_pack DIR instead"
    )


def _demo(asked: Asked) -> str | None:
    return _other_model(asked) if asked.given("flash_pack") else None


def _bits(asked: Asked) -> str | None:
    name = draft_name(asked.args)
    if name != "low-bit":
        return f"it is about the draft low-bit, and the draft is {name}; leave it out"
    if not asked.given("flash_pack"):
        return "the demo target has a draft of its own; give --flash_pack DIR, or leave it out"
    return None


def _draft(asked: Asked) -> str | None:
    if asked.value("tree") == "none" and asked.value("draft") != "none":
        return "--tree none means no speculation: leave one of them out"
    return None


def _trees(asked: Asked) -> str | None:
    """Why there are none."""
    if asked.flash and draft_name(asked.args) == "none" and asked.value("tree") != "none":
        return "--draft none means no speculation: leave one of them out"
    return None


def _beside_trees(asked: Asked) -> str | None:
    if asked.flash and draft_name(asked.args) == "none":
        return "without a draft there is no speculation; leave it out"
    return None


def _size(asked: Asked) -> str | None:
    tree = asked.value("tree") or "lever"
    if tree in SIZED:
        return None
    return f"the tree {tree} has no size to choose; give --tree {', '.join(SIZED)}, or leave it out"


_ENGINE = tuple(
    [item.name for item in fields(Settings)]
    + [old.name for old in OLD_SETTINGS]
    + ["cpu_infer", "use_cuda_graph", "timeline", "record_trace"]
)

IDLE = (
    Idle(("tree_size", "draft_bits", "throttle", "overlap"), _only_on_flash),
    Idle(("vram_budget",), _vram),
    Idle(_ENGINE, _only_with_engine),
    Idle(("sampler", "chunk_prefill_size"), _own_decoding),
    Idle(("dtype",), _dtype),
    Idle(("gguf_path", "model_path"), _other_model),
    Idle(("demo",), _demo),
    Idle(("draft_bits",), _bits),
    Idle(("draft",), _draft),
    Idle(("tree",), _trees),
    Idle(("tree_size", "overlap", "early_exit"), _beside_trees),
    Idle(("tree_size",), _size),
)
"""See `hybrimoe_plugin.cli.chat.effects`."""
