"""Conversations with a kept KV cache, and the tokens that they compute."""

from __future__ import annotations

from typing import Any

import tiny
import torch

from hybrimoe_plugin.hosts.transformers.chat.kept_cache import KeptCache

TOKENS = 4
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": TOKENS,
    "min_new_tokens": TOKENS,
    "pad_token_id": 0,
}


class Talk:
    """Asks a model with a kept cache, and counts the tokens that it computes."""

    def __init__(self, model: Any, nbytes: int = 0) -> None:
        self.model = model
        self.kept = KeptCache(model, nbytes)
        self.computed = 0
        model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _model: Any, _args: Any, kwargs: Any, _output: Any) -> None:
        self.computed += kwargs["input_ids"].shape[1]

    def ask(self, prompt: list[int], piece: int = 10_000) -> list[int]:
        """The whole sequence."""
        self.computed = 0
        cache = self.kept.arguments(prompt)
        self.kept.compute(prompt, piece)
        found = self._generate(prompt, **cache)
        self.kept.commit(found)
        return found

    def anew(self, prompt: list[int]) -> list[int]:
        """The same without a cache from before."""
        return self._generate(prompt)

    def _generate(self, prompt: list[int], **cache: Any) -> list[int]:
        ids = torch.tensor([prompt])
        # A mask, or `generate` would hide tokens that look like padding.
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **GREEDY)
        found: list[int] = output[0].tolist()
        return found


def words(count: int, seed: int) -> list[int]:
    found: list[int] = tiny.tokens(count, seed)[0].tolist()
    return found
