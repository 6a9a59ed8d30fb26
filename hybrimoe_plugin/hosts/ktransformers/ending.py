"""Where answers of `local_chat` end, and how they begin, beyond what its loop knows."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.hosts.ends import ends_of

_THEIR_END = "<|im_end|>"
"""Their loop ends at the tokenizer's one end token, and at any token that reads so."""
_THEIR_THINK = "<think>\\n"
"""What --force_think adds: a backslash and an n, as it stands in their code."""


class EndingTokenizer:
    """A tokenizer in whose reading every end of the model's is the one that their loop knows.

    Args:
        tokenizer: what everything else is asked of.
        ends: ids at which answers end.
    """

    def __init__(self, tokenizer: Any, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> EndingTokenizer:
        """With the ends that generation config, tokenizer and GGUF of a loaded model name."""
        named = getattr(model.generation_config, "eos_token_id", None)
        metadata = getattr(model.gguf_loader, "gguf_file_meta", {})
        return cls(
            tokenizer, ends_of(tokenizer, metadata, named if isinstance(named, list) else [named])
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, *arguments: Any, **options: Any) -> str:
        """The text of ids; for a single id that ends answers, their loop's end mark.

        Only their loop hands over a single id, as a tensor.
        """
        if isinstance(ids, torch.Tensor) and ids.numel() == 1 and int(ids) in self._ends:
            return _THEIR_END
        return str(self._tokenizer.decode(ids, *arguments, **options))


def without_second_think(tokenizer: Any, ids: torch.Tensor) -> torch.Tensor:
    """Prompt ids [1, T] without --force_think's <think> where the template adds one itself."""
    added = tokenizer.encode(_THEIR_THINK, add_special_tokens=False)
    found = ids[0].tolist()
    if not added or found[-len(added) :] != added:
        return ids
    before = tokenizer.decode(found[: -len(added)]).rstrip()
    return ids[:, : -len(added)] if before.endswith("<think>") else ids
