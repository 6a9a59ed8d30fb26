"""The KV caches of conversations, kept from one call of `generate` to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.compute.attention.kept_entries import KeptEntries, can_be_cut
from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.hosts.transformers.prefixes.entry import Ids, as_ids, shared_part
from hybrimoe_plugin.hosts.transformers.prefixes.kinds import can_go_on, pass_options
from hybrimoe_plugin.hosts.transformers.prefixes.layers import bytes_of, held_by, trim
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore


class _Mark(NamedTuple):
    """A place in the present conversation that can be gone back to."""

    ids: Ids
    entries: KeptEntries


class KeptCache:
    """Saves the computation of a prompt's beginning that an earlier call has computed already.

        kept    | system | question | answer |
        prompt  | system | question | answer | next question |
                |<-------- shared --------->|<-- computed -->|

    The present conversation stays where it is computed, and goes back to where a prompt branches
    off late in it: anywhere if its layers can be cut, else to one of two marks, at its end and
    before its last pass. Other conversations come from a store.

    What a mark names can be had again at any time, whatever interrupts the passes behind it. That
    is why `commit` comes after `generate`, and nothing is undone after an exception.

    One conversation at a time: calls of several threads need a cache each.

    Args:
        model: a causal language model of transformers, injected or not.
        nbytes: memory for conversations beside the present one.

    Attributes:
        shared: tokens of the last prompt that were not computed again.
        store: the conversations beside the present one.
    """

    def __init__(self, model: Any, nbytes: int = 0) -> None:
        self.shared = 0
        self._model = model
        self.store = PrefixStore(model, nbytes)
        self._cache: Any = None
        self._marks: tuple[_Mark, ...] = ()
        """Of the present conversation, the last one last; one where the cache can be cut."""

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
        shared = self._go_back(prompt)
        if not shared:
            self.put_aside()
            self._cache, shared = self.store.begin(prompt)
            self._marks = (_Mark(as_ids(prompt[:shared]), KeptEntries(self._cache, shared)),)
        self.shared = shared
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
        options = {cache_name(self._model): self._cache, **pass_options(self._model)}
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
        held = held_by(layers)
        if not held or (held > len(sequence) and not self._can_be_cut()):
            self._leave()
            return
        for layer in layers:
            trim(layer)
        count = min(held, len(sequence))
        mark = _Mark(as_ids(sequence[:count]), KeptEntries(self._cache, count))
        self._marks = (mark,) if self._can_be_cut() else (*self._marks[-1:], mark)

    def drop(self) -> None:
        """Forget all conversations and give their memory back."""
        self._leave()
        self.store.clear()

    def put_aside(self) -> None:
        """Hand the present conversation over to the store: it may come back."""
        marks, cache = self._marks, self._cache
        self._leave()
        if marks and len(marks[-1].ids):
            marks[-1].entries.drop_rest()
            self.store.end(marks[-1].ids, cache)

    @torch.no_grad()
    def _go_back(self, prompt: Sequence[int]) -> int:
        """Go back to where a prompt leaves the present conversation.

        Returns:
            Tokens that it holds then; 0 where the store is the better way, and nothing was done.
        """
        if not self._marks:
            return 0
        in_part = self._can_be_cut()
        # Not far back where the store has room for all that would be lost.
        has_room = bytes_of(self._cache.layers) <= self.store.limit
        least = len(self._marks[-1].ids) // 2 if has_room else 0
        # The last token is always computed: its logits give the first of the answer.
        wanted = as_ids(prompt[:-1])
        for number, mark in reversed(list(enumerate(self._marks))):
            shared = shared_part(mark.ids, wanted, least, in_part)
            if shared and shared >= self.store.longest(prompt):
                # First: an interrupt may come before, in or after each of the following.
                self._marks = (*self._marks[:number], _Mark(mark.ids[:shared], mark.entries))
                if in_part:
                    mark.entries.keep(shared)
                mark.entries.drop_rest()
                return shared
        return 0

    def _leave(self) -> None:
        self._marks = ()
        self._cache = None
        self.shared = 0

    def _can_be_cut(self) -> bool:
        return all(map(can_be_cut, self._cache.layers))


def _takes_cache(config: Any) -> bool:
    """Whether a generation config leaves the choice of the cache to us."""
    if config is None:
        return True
    if getattr(config, "cache_implementation", None) is not None:
        return False
    return getattr(config, "use_cache", None) is not False
