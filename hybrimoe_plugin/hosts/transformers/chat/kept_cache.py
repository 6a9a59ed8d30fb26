"""The KV caches of conversations, kept from one call of `generate` to the next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_name, can_be_cut, cut_entries
from hybrimoe_plugin.hosts.transformers.prefixes.entry import as_ids, shared_part
from hybrimoe_plugin.hosts.transformers.prefixes.kinds import can_go_on
from hybrimoe_plugin.hosts.transformers.prefixes.layers import bytes_of, held_by
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore


class KeptCache:
    """Saves the computation of a prompt's beginning that an earlier call has computed already.

        kept    | system | question | answer |
        prompt  | system | question | answer | next question |
                |<-------- shared --------->|<-- computed -->|

    The present conversation stays where it is computed, and is cut where a prompt branches off late
    in it. Others, and those parts of it, come from a store.

    The entries of the first `len(ids)` tokens are right in every layer, at any time. Where layers
    can be cut, a forward pass only appends behind them, so whatever interrupts it, at worst a rest
    is left that the next call cuts off. Other layers are spoilt by an interrupted pass: there are
    no `ids` while one may run. That is why `commit` comes after `generate`, and nothing is undone
    after an exception.

    One conversation at a time: calls of several threads need a cache each.

    Args:
        model: a causal language model of transformers, injected or not.
        nbytes: memory for conversations beside the present one.

    Attributes:
        shared: tokens of the last prompt that were not computed again.
    """

    def __init__(self, model: Any, nbytes: int = 0) -> None:
        self.shared = 0
        self._model = model
        self._store = PrefixStore(model, nbytes)
        self._cache: Any = None
        self._ids: list[int] = []
        """The tokens whose entries are in the cache."""

    def arguments(self, prompt: Sequence[int], config: Any = None) -> dict[str, Any]:
        """`generate`'s argument for a prompt, which must be given to it whole.

        Args:
            prompt: token ids.
            config: the generation config of the call, which may ask for another kind of cache.

        Returns:
            The cache, with what the prompt shares with those kept; nothing where none can be kept:
            `generate` then makes its own.
        """
        if not _takes_cache(config) or not can_go_on(self._model):
            self.drop()
            return {}
        shared = self._shared_with_present(prompt)
        if shared:
            # Before the cut, which may be interrupted: the promise about `ids` must hold then too.
            self._ids = self._ids[:shared]
            if self._can_be_cut():
                for layer in self._cache.layers:
                    cut_entries(layer, shared)
        else:
            self.put_aside()
            self._cache, shared = self._store.begin(prompt)
            self._ids = list(prompt[:shared])
        self.shared = shared
        self._begin_pass()
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
            self._begin_pass()
            self._model(input_ids=ids, **options)
            done += piece
            self.commit(prompt[:done])
            computed(piece)
        self._begin_pass()

    def commit(self, sequence: Sequence[int]) -> None:
        """Note what the cache holds, once a call has returned.

        Args:
            sequence: the prompt and all tokens after it. The last of them may have no entry yet.
        """
        if self._cache is None:
            return
        held = held_by(self._cache.layers)
        if not held or (held > len(sequence) and not self._can_be_cut()):
            self._leave()
            return
        self._ids = list(sequence[:held])

    def drop(self) -> None:
        """Forget all conversations and give their memory back."""
        self._leave()
        self._store.clear()

    def put_aside(self) -> None:
        """Hand the present conversation over to the store: it may come back."""
        ids, cache = self._ids, self._cache
        self._leave()
        if ids:
            self._store.end(ids, cache)

    def _shared_with_present(self, prompt: Sequence[int]) -> int:
        """Tokens to go on behind in the present conversation; 0 where the store is the better way.

        Not behind few of them where the store has room for all: the others would be lost.
        """
        if not self._ids:
            return 0
        in_part = self._can_be_cut()
        has_room = bytes_of(self._cache.layers) <= self._store.limit
        least = len(self._ids) // 2 if in_part and has_room else 0
        # The last token is always computed: its logits give the first of the answer.
        shared = shared_part(as_ids(self._ids), as_ids(prompt[:-1]), least, in_part)
        return shared if shared >= self._store.longest(prompt) else 0

    def _leave(self) -> None:
        self._ids = []
        self._cache = None
        self.shared = 0

    def _begin_pass(self) -> None:
        """Promise nothing that a pass may break."""
        if not self._can_be_cut():
            self._ids = []

    def _can_be_cut(self) -> bool:
        return all(map(can_be_cut, self._cache.layers))


def _takes_cache(config: Any) -> bool:
    """Whether a generation config leaves the choice of the cache to us."""
    if config is None:
        return True
    if getattr(config, "cache_implementation", None) is not None:
        return False
    return getattr(config, "use_cache", None) is not False
