"""Speculative decoding with a target that lives on flash, by HybriMoE's injection mechanism.

    from lever_ext import LeverDecoding, load_target, make_draft, make_policy, pack_tokenizer

    # "packed" was made by: hybrimoe flash_pack --gguf_path MODEL.gguf --output packed
    target, tokenizer = load_target("packed", dram_budget="1GiB"), pack_tokenizer("packed")
    # or "ngram", or the path of a small model's GGUF:
    draft = make_draft("low-bit", target, tokenizer)
    decoder = LeverDecoding(draft, make_policy("lever"), target)
    target.model.generate(**inputs, custom_generate=decoder, max_new_tokens=100)
    print("\\n".join(decoder.stats.lines()))

The text is the target's own, for every draft and tree: greedy decoding gives the same tokens as
plain `generate`, sampling the same distribution. Importing this package imports neither torch nor
transformers.

The rooms, from the ground up; each imports only from those above it in this list:

    tree            token trees, what they gain and cost, and the policies that build them: no torch
    flash           storage: packs, reads, the DRAM plan, streams of layers, the expert cache
    early_exit      pruning of a tree in the middle of a pass
    operators       what rules name: decoder layers and experts whose weights live on flash
    placement       which layers an accelerator computes
    target          a target: model, pack, operators and placement, put together
    packing         from a model's files to a pack
    drafts          what proposes tokens
    speculation     one answer: draft, verify, accept, learn
    decoding        `generate`'s custom decoding method
    exit_training   training of the early exit
    flips           how often verification in low precision chooses another token
    demo            the demo targets
    cli             the commands, and the flags of `hybrimoe local_chat`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lever_ext.decoding import LeverDecoding
    from lever_ext.drafts.make import make_draft
    from lever_ext.exit_training import train_exit
    from lever_ext.packing import pack_model, pack_tokenizer
    from lever_ext.target import FlashTarget, load_target
    from lever_ext.tree.policies import make_policy

_PLACES = {
    "LeverDecoding": "decoding",
    "FlashTarget": "target",
    "load_target": "target",
    "make_draft": "drafts.make",
    "make_policy": "tree.policies",
    "pack_model": "packing",
    "pack_tokenizer": "packing",
    "train_exit": "exit_training",
}
"""Public name -> the module that defines it, imported on first use."""

__all__ = [
    "FlashTarget",
    "LeverDecoding",
    "load_target",
    "make_draft",
    "make_policy",
    "pack_model",
    "pack_tokenizer",
    "train_exit",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"lever_ext.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
