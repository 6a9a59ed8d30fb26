"""The tokens that end an answer: those that files name, and llama.cpp's list of names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

log = logging.getLogger(__name__)

_NAMES = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
        "<turn|>",
        "<|tool_response>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "</s>",
        "[e~[",
        "<|fim_pad|>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<|file_sep|>",
    )
)
"""Tokens at which llama.cpp ends by name (its `special_eog_ids`), those after a piece of infilled
code included.
"""

_ORDINARY = frozenset(("_<EOT>", "[EOT]", "[EOS]", "<EOT>", "<eos>", "</s>", "[e~["))
"""Those that may be plain text in a vocabulary which does not mark them as control tokens."""

_KEYS = ("eos", "eot", "eom")


def looks_like_an_end(token: str) -> bool:
    """Whether a token ends a turn by its name, however a file marks it."""
    return token in _NAMES - _ORDINARY


def ends_of(
    tokenizer: Any, metadata: Mapping[str, Any], named: Iterable[Any] = (), size: int | None = None
) -> list[int]:
    """Ids at which an answer ends, without repetition; those that are named first come first.

    Args:
        tokenizer: of the model, or None.
        metadata: of the GGUF file.
        named: ids that the model's generation config names.
        size: rows of the embedding; ids beyond are left out.
    """
    ids = [*named, getattr(tokenizer, "eos_token_id", None)]
    ids += [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _KEYS]
    ids += _by_name(tokenizer)
    whole = [index for index in ids if type(index) is int and index >= 0]
    found = list(dict.fromkeys(index for index in whole if size is None or index < size))
    if len(set(whole)) > len(found):
        log.warning(
            "end tokens beyond the model's %s embeddings are left out: %s",
            size,
            sorted(set(whole) - {*found}),
        )
    return found


def _by_name(tokenizer: Any) -> list[int]:
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    names = {name: index for name, index in added.items() if name in _NAMES}
    # Where answers have several parts, this ends a part.
    if {"<|return|>", "<|call|>"} <= names.keys() or {"<|calls|>", "<|flush|>"} <= names.keys():
        names.pop("<|end|>", None)
    if "<|tool_response>" in names:
        names.pop("</s>", None)
    return sorted(names.values())
