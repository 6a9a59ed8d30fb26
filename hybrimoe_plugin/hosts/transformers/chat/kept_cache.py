"""The KV cache of a conversation, kept from one call of `generate` to the next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hybrimoe_plugin.compute.attention.kv_cache import cache_name, can_be_cut, cut_entries

_MOVING_ROPES = ("dynamic", "longrope")
"""Rotations that depend on the length of the whole sequence, as no kept key can."""


class KeptCache:
    """Saves the computation of a prompt's beginning that an earlier call has computed already.

        kept    | system | question | answer |
        prompt  | system | question | answer | next question |
                |<-------- shared --------->|<-- computed -->|

    The entries of the first `len(ids)` tokens are right in every layer, at any time. A forward pass
    only appends behind them, so whatever interrupts it, at worst a rest is left that the next call
    cuts off. That is why `commit` comes after `generate`, and nothing is undone after an exception.

    One conversation at a time: calls of several threads need a cache each.

    Args:
        model: a causal language model of transformers, injected or not.

    Attributes:
        shared: tokens of the last prompt that were not computed again.
    """

    def __init__(self, model: Any) -> None:
        self.shared = 0
        self._model = model
        self._cache: Any = None
        self._ids: list[int] = []
        """The tokens whose entries are in the cache."""

    def arguments(self, prompt: Sequence[int], config: Any = None) -> dict[str, Any]:
        """`generate`'s argument for a prompt, which must be given to it whole.

        Args:
            prompt: token ids.
            config: the generation config of the call, which may ask for another kind of cache.

        Returns:
            The cache, cut to what the prompt shares with it; nothing where none can be kept:
            `generate` then makes its own.
        """
        if not self._can_be_kept(config):
            self.drop()
            return {}
        # The last token is always computed: its logits give the first of the answer.
        shared = _common(self._ids, prompt[:-1])
        # Before the cut, which may be interrupted: the promise about `ids` must hold then too.
        self._ids = self._ids[:shared]
        self.shared = shared
        if shared:
            for layer in self._cache.layers:
                cut_entries(layer, shared)
        else:
            self._cache = _new_cache(self._model)
        return {cache_name(self._model): self._cache}

    @torch.no_grad()
    def compute(
        self, prompt: Sequence[int], piece: int, computed: Callable[[int], object] = lambda _: None
    ) -> None:
        """Compute a long prompt in pieces, but for the last one, which `generate` computes.

        Not by `prefill_chunk_size` of `generate`: transformers 5.17 computes the whole prompt again
        behind what a cache holds. And here an interrupt keeps the pieces that are done.

        Args:
            prompt: as given to `arguments`, whose cache is filled.
            piece: most tokens of a piece.
            computed: is told each piece's tokens.
        """
        if self._cache is None:
            return
        options: dict[str, Any] = {cache_name(self._model): self._cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            options["logits_to_keep"] = 1
        device = getattr(self._model, "device", None)
        done = self.shared
        while len(prompt) - done > piece:
            ids = torch.tensor([prompt[done : done + piece]], device=device)
            self._model(input_ids=ids, **options)
            done += piece
            self.commit(prompt[:done])
            computed(piece)

    def commit(self, sequence: Sequence[int]) -> None:
        """Note what the cache holds, once a call has returned.

        Args:
            sequence: the prompt and all tokens after it. The last of them may have no entry yet.
        """
        if self._cache is None:
            return
        layers = self._cache.layers
        if not layers or not all(map(_is_kept, layers)):
            self.drop()
            return
        self._ids = list(sequence[: min(map(_length, layers))])

    def drop(self) -> None:
        """Forget the conversation and give its memory back."""
        self._ids = []
        self._cache = None
        self.shared = 0

    def _can_be_kept(self, config: Any) -> bool:
        if config is not None:
            if getattr(config, "cache_implementation", None) is not None:
                return False
            if getattr(config, "use_cache", None) is False:
                return False
        if _rope_kinds(self._model.config) & set(_MOVING_ROPES):
            return False
        # Sliding windows and linear attention have lost what a shorter prefix would need.
        cache = _new_cache(self._model) if self._cache is None else self._cache
        return all(map(can_be_cut, cache.layers))


def _new_cache(model: Any) -> Any:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _is_kept(layer: Any) -> bool:
    """Whether a layer can be cut and holds entries of one sequence."""
    return can_be_cut(layer) and layer.is_initialized and layer.keys.shape[0] == 1


def _length(layer: Any) -> int:
    """Entries of which both key and value are there."""
    return int(min(layer.keys.shape[2], layer.values.shape[2]))


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for ours, theirs in zip(held, prompt, strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def _rope_kinds(config: Any) -> set[str]:
    """Kinds of rotation that a config names, for all layers or for each kind of layer."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    if not isinstance(found, dict):
        return set()
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    return {str(part.get("rope_type")) for part in parts}
