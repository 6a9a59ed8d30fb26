"""Whether a config.json and a GGUF file describe the same model."""

from __future__ import annotations

import math
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.description import Description
from hybrimoe_plugin.families.registry import find_family
from hybrimoe_plugin.families.rope import difference

PADDING_ROWS = 512
"""Tokens by which vocabularies of one tokenizer may differ: some converters drop rows of padding,
others add them.
"""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of one thing, which differ between families."""
_CLOSE = 1e-5
"""Relative difference that comes of the file's float32."""


def check_same_model(config: Any, described: Description, directory: str) -> None:
    """Compare what a directory's config and the GGUF file both state.

    Raises:
        WeightsError: naming both values.
    """
    kind = described.family.model_type
    wrong = []
    if not _same_type(config.model_type, kind):
        wrong.append(_clash("model_type", config.model_type, kind))
    for name, theirs in described.stated.items():
        ours = getattr(config, name, None)
        left_open = ours is None and name != "sliding_window"
        if not left_open and not _agree(name, ours, theirs):
            shown = "number of experts" if name in _EXPERTS else name
            wrong.append(_clash(shown, ours, theirs))
    if not wrong:
        rope = difference(config, described.rope)
        wrong = [] if rope is None else [rope]
    if wrong:
        raise WeightsError(f"{directory} does not match {described.where}: {'; '.join(wrong)}")


def follow_file(config: Any, described: Description) -> None:
    """Take from the file what is the weights' own: rows of padding, and a head of its own.

    Mutates: `config`.
    """
    config.vocab_size = described.stated["vocab_size"]
    if not described.assumed["tie_word_embeddings"]:
        config.tie_word_embeddings = False


def _clash(name: str, ours: Any, theirs: Any) -> str:
    return f"{name} is {ours} there and {theirs} in the GGUF"


def _same_type(ours: str, theirs: str) -> bool:
    """Whether files of one type look like those of the other, or are the same."""
    if ours == theirs:
        return True
    family = find_family(ours)
    return family is not None and family.stored_as == theirs


def _agree(name: str, ours: Any, theirs: Any) -> bool:
    if name == "vocab_size":
        return abs(ours - theirs) < PADDING_ROWS
    if not isinstance(ours, float) and not isinstance(theirs, float):
        return bool(ours == theirs)
    if not isinstance(ours, int | float):
        return False
    return math.isclose(ours, theirs, rel_tol=_CLOSE)
