"""KV caches of sequences that are done, for prompts that begin as they do."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.compute.attention.kept_entries import can_be_cut, cut_entries
from hybrimoe_plugin.hosts.transformers.prefixes.entry import (
    Entry,
    Ids,
    Tokens,
    as_ids,
    copied_entry,
    entry_of,
    shared_part,
)
from hybrimoe_plugin.hosts.transformers.prefixes.kinds import can_branch, can_go_on, new_cache
from hybrimoe_plugin.hosts.transformers.prefixes.layers import (
    HOST,
    copy_of,
    device_of,
    held_by,
)


class _Source(NamedTuple):
    """Where a prompt's first tokens come from."""

    layers: Sequence[Any]
    devices: Sequence[torch.device]
    shared: int
    kept: Entry | None = None
    """The entry that this is; None for a sequence that runs."""


class PrefixStore:
    """Keeps KV caches in main memory, the last used ones, and hands them out again.

        kept    | system | question | answer |
        prompt  | system | question | answer | next question |    handed over, and extended
        prompt  | system | other question |                       its first part is copied

    Layers with sliding windows or linear attention cannot be cut: a prompt then shares all tokens
    of a kept sequence or none. Models whose positions depend on the whole length share nothing.

    Every entry is right at any time. A call that is interrupted may lose the sequence that it was
    to hand out or to keep, and no other.

    Args:
        model: a causal language model of transformers, injected or not.
        nbytes: most bytes to keep. Caches that are handed out do not count.

    Attributes:
        limit: most bytes to keep.
        lookups: prompts begun.
        hits: prompts of which at least one token was not computed again.
        hit_tokens: tokens that were not computed again.
    """

    def __init__(self, model: Any, nbytes: int) -> None:
        self.limit = nbytes
        self.lookups = 0
        self.hits = 0
        self.hit_tokens = 0
        self._model = model
        self._entries: tuple[Entry, ...] = ()
        """The last used one last. Replaced, not changed: it is whole at any time."""
        self._lock = threading.Lock()

    @cached_property
    def _can_go_on(self) -> bool:
        return can_go_on(self._model)

    @cached_property
    def can_branch(self) -> bool:
        """Whether a prompt can take the first part of another sequence that runs."""
        return can_branch(self._model)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(entry.nbytes for entry in self._entries)

    @property
    def sequences(self) -> int:
        """Sequences kept."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget all sequences and give their memory back."""
        with self._lock:
            self._entries = ()

    def longest(self, prompt: Tokens) -> int:
        """Tokens of a prompt that `begin` would find among the sequences kept."""
        source = self._find(as_ids(prompt[:-1]), ())
        return 0 if source is None else source.shared

    @torch.no_grad()
    def begin(self, prompt: Tokens, running: Iterable[tuple[Tokens, Any]] = ()) -> tuple[Any, int]:
        """A cache for a prompt, with what is known of it.

        Args:
            prompt: token ids.
            running: tokens and caches of other sequences, between two passes. They are copied from
                and stay as they are.

        Returns:
            A cache that nobody else uses, and how many of the prompt's tokens it holds: never all,
            as the last one's logits are wanted.
        """
        cache = new_cache(self._model)
        with self._lock:
            source = None
            if self._can_go_on:
                source = self._find(as_ids(prompt[:-1]), running)
            shared = 0
            if source is not None:
                cache.layers = self._taken(source)
                shared = source.shared
            self.lookups += 1
            self.hits += shared > 0
            self.hit_tokens += shared
        return cache, shared

    @torch.no_grad()
    def end(self, ids: Tokens, cache: Any) -> None:
        """Keep the cache of a sequence that is done, if it can be of use and fits.

        Args:
            ids: prompt and answer. The cache holds the entries of the first of them; of all, if it
                holds more and can be cut.
            cache: as `begin` gave it. The caller gives it away. Mutates. Of a sequence whose last
                pass was interrupted, only if it can be cut: nothing shows what others have seen.
        """
        with self._lock:
            count = self._count_to_keep(ids, cache)
            if count:
                self._add(entry_of(as_ids(ids[:count]), cache.layers))

    @torch.no_grad()
    def save(self, ids: Tokens, cache: Any) -> None:
        """Keep a copy of the cache of a sequence that goes on, between two passes.

        For caches that cannot be cut: other prompts can branch off here, and nowhere else.

        Args: as for `end`, but the cache stays as it is.
        """
        with self._lock:
            count = self._count_to_keep(ids, cache)
            if count:
                self._add(copied_entry(as_ids(ids[:count]), cache.layers))

    def _count_to_keep(self, ids: Tokens, cache: Any) -> int:
        """How many tokens of a sequence are worth an entry; 0 where it is of no use."""
        count = self._usable(ids, cache) if self.limit else 0
        if not count:
            return 0
        known = as_ids(ids[:count])
        in_part = _can_be_cut(cache)
        for entry in self._entries:
            if _is_covered(known, entry.ids, in_part):
                self._touch(entry)
                return 0
        return count

    def _add(self, entry: Entry) -> None:
        if entry.nbytes > self.limit:
            return
        others = [
            other
            for other in self._entries
            if not _is_covered(other.ids, entry.ids, entry.can_be_cut)
        ]
        self._entries = self._fitting((*others, entry))

    def _usable(self, ids: Tokens, cache: Any) -> int:
        """Tokens whose entries a cache holds, as far as others can go on behind them."""
        if not self._can_go_on:
            return 0
        held = held_by(cache.layers)
        if held > len(ids) and not _can_be_cut(cache):
            return 0
        return min(held, len(ids))

    def _find(self, wanted: Ids, running: Iterable[tuple[Tokens, Any]]) -> _Source | None:
        """What shares most tokens with a prompt but for its last; of equals the last used."""
        best: _Source | None = None
        for entry in reversed(self._entries):
            least = best.shared if best else 0
            shared = shared_part(entry.ids, wanted, least, entry.can_be_cut)
            if shared:
                best = _Source(entry.layers, entry.devices, shared, entry)
        for ids, cache in running:
            least = best.shared if best else 0
            shared = self._shared_with_running(ids, cache, wanted, least)
            if shared:
                layers = cache.layers
                best = _Source(layers, [device_of(layer) for layer in layers], shared)
        return best

    def _shared_with_running(self, ids: Tokens, cache: Any, wanted: Ids, least: int) -> int:
        if least >= min(len(ids), len(wanted)) or ids[least] != wanted[least]:
            return 0
        held = self._usable(ids, cache)
        return shared_part(as_ids(ids[:held]), wanted, least, _can_be_cut(cache))

    def _taken(self, source: _Source) -> list[Any]:
        """The layers for a prompt: an entry's own where nothing is lost by it, else copies."""
        entry, shared = source.kept, source.shared
        gives_away = entry is not None and self._gives_away(entry, shared)
        if entry is not None and gives_away and all(device == HOST for device in entry.devices):
            self._entries = self._without(entry)  # first: from here on it is the caller's
            if shared < len(entry.ids):
                for layer in entry.layers:
                    cut_entries(layer, shared)
            return entry.layers
        copies = [
            copy_of(layer, shared, device)
            for layer, device in zip(source.layers, source.devices, strict=True)
        ]
        if entry is not None and gives_away:
            self._entries = self._without(entry)
        elif entry is not None:
            self._touch(entry)
        return copies

    def _touch(self, entry: Entry) -> None:
        """Note that an entry was used."""
        self._entries = (*self._without(entry), entry)

    def _gives_away(self, entry: Entry, shared: int) -> bool:
        """Whether an entry leaves the store: nothing is left over, or not both would fit."""
        copied = entry.nbytes * shared // len(entry.ids)
        return shared == len(entry.ids) or entry.nbytes + copied > self.limit

    def _without(self, entry: Entry) -> tuple[Entry, ...]:
        return tuple(other for other in self._entries if other is not entry)

    def _fitting(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """The last of these that fit."""
        left = self.limit
        for number, entry in enumerate(reversed(entries)):
            left -= entry.nbytes
            if left < 0:
                return tuple(entries[len(entries) - number :])
        return tuple(entries)


def _is_covered(old: Ids, new: Ids, in_part: bool) -> bool:
    """Whether all that a sequence is good for another one does as well.

    Args:
        in_part: whether less than the whole of the new one can be used.
    """
    if len(old) > len(new) or (len(old) < len(new) and not in_part):
        return False
    if old[-1] != new[len(old) - 1]:
        return False
    return bool((old == new[: len(old)]).all())


def _can_be_cut(cache: Any) -> bool:
    return all(map(can_be_cut, cache.layers))
