"""Passes through the model: pieces of prompts, and the next tokens of several answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.compute.attention.sequences import SequencesCache, can_share
from hybrimoe_plugin.compute.attention.shelf import Shelf, shelf_for
from hybrimoe_plugin.hosts.transformers.batches import decides_by_rows
from hybrimoe_plugin.hosts.transformers.prefixes.kinds import (
    can_branch,
    can_go_on,
    new_cache,
    pass_options,
)
from hybrimoe_plugin.operators.attention import AttentionOperator
from hybrimoe_plugin.policy.step import FEW_ROWS, Rows
from hybrimoe_plugin.serve.batching.delivery import Holder


class Part(NamedTuple):
    """Tokens of one sequence in a pass, which continue what its cache holds."""

    ids: Sequence[int]
    cache: Any


class Passes(Holder):
    """Computes logits of sequences that each have a KV cache of their own.

    Args:
        model: a causal language model of transformers, injected or not.

    Attributes:
        most_rows: sequences that one pass can take; 1 where the model cannot take several.
        takes_pieces: whether prompts may be computed in pieces.
        takes_parts: whether pieces of several prompts, and next tokens, may be computed together.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._name = cache_name(model)
        self._options = pass_options(model)
        cache = new_cache(model)
        operators = [part for part in model.modules() if isinstance(part, AttentionOperator)]
        self._needs_mask = len(operators) < len(cache.layers)
        self.takes_pieces = can_go_on(model)
        self.most_rows = FEW_ROWS if self.takes_pieces and can_share(cache) else 1
        self.takes_parts = can_branch(model) and not self._needs_mask
        self._together: SequencesCache | None = None
        """Of the last pass over several sequences."""
        self._shelf: Shelf | None = None
        """On which sequences lie, where it pays."""

    @torch.no_grad()
    def piece(self, ids: Sequence[int], cache: Any) -> torch.Tensor:
        """Logits [V] behind the last of these tokens, which continue what the cache holds.

        Mutates: the cache.
        """
        self._leave(cache)
        given = torch.tensor([list(ids)], device=self._model.device)
        output = self._model(input_ids=given, **{self._name: cache}, **self._options)
        last: torch.Tensor = output.logits[0, -1]
        return last

    @torch.no_grad()
    def step(
        self, tokens: Sequence[int], caches: Sequence[Any], owners: Sequence[int]
    ) -> torch.Tensor:
        """Logits [R, V] behind one more token of each of R sequences.

        Args:
            tokens: the newest of each, which has no entry yet.
            owners: a number for each sequence, under which policies know its conversation.

        Mutates: the caches. After an error they are of no use; other sequences' are as before.
        """
        if len(tokens) == 1:
            if self._shelf is not None:
                self.settle(caches[0])
            return self.piece(tokens, caches[0])[None]
        together = self._joined(caches)
        order = [caches.index(cache) for cache in together.caches]
        tokens, owners = ([values[place] for place in order] for values in (tokens, owners))
        device = self._model.device
        held = [_length(cache) for cache in together.caches]
        together.begin(held, self._model.dtype)
        lengths = torch.tensor(held, device=device)
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "position_ids": lengths[:, None],
            self._name: together,
            **self._options,
        }
        if self._needs_mask:
            arguments["attention_mask"] = _padding(lengths)
        try:
            output = self._run(Rows(np.asarray(owners), np.ones(len(owners), bool)), arguments)
        except BaseException:
            self._together = self._shelf = None  # what they hold of these sequences is of no use
            raise
        last: torch.Tensor = output.logits[:, -1]
        return last[_inverse(order)]

    @torch.no_grad()
    def parts(self, parts: Sequence[Part]) -> torch.Tensor:
        """Logits [P, V] behind the tokens of each of P sequences.

        Args:
            parts: one, or several where the model `takes_parts`.

        Mutates: the caches. After an error they are of no use.
        """
        if len(parts) == 1:
            return self.piece(*parts[0])[None]
        self.settle()
        device = self._model.device
        counts = [len(part.ids) for part in parts]
        ids = [token for part in parts for token in part.ids]
        places = [
            place
            for part in parts
            for place in range(_length(part.cache), _length(part.cache) + len(part.ids))
        ]
        last = torch.tensor(counts, device=device).cumsum(0) - 1
        options = dict(self._options)
        picks = "logits_to_keep" in options
        if picks:
            options["logits_to_keep"] = last
        output = self._model(
            input_ids=torch.tensor(ids, device=device)[None],
            position_ids=torch.tensor(places, device=device)[None],
            **{self._name: SequencesCache([part.cache for part in parts], counts)},
            **options,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if picks else logits[last]

    def settle(self, cache: Any = None) -> None:
        """Give every sequence its states back, as before the first pass with others.

        Args:
            cache: of a sequence that is to have memory of its own, because others will use it.
        """
        if self._together is not None:
            self._together.settle()
        self._together = None  # after its effect: interrupted, it is done again
        if self._shelf is not None and cache is not None:
            self._shelf.release(cache)
            self._drop_empty_shelf()

    def forget(self, cache: Any) -> None:
        """Have nothing to do any more with a sequence whose cache is of no use."""
        self._leave(cache)
        if self._shelf is not None:
            self._shelf.forget(cache)
            self._drop_empty_shelf()

    def _drop_empty_shelf(self) -> None:
        if self._shelf is not None and self._shelf.is_empty:
            self._shelf = None

    def _leave(self, cache: Any) -> None:
        """Let a sequence be computed alone."""
        if self._together is not None and cache in self._together.caches:
            self.settle()

    def _joined(self, caches: Sequence[Any]) -> SequencesCache:
        """The cache of a pass over these sequences, kept while they are the same."""
        known, shelf = self._together, self._shelf
        is_full = shelf is not None and max(map(_length, caches)) >= shelf.capacity
        # In any order: on a shelf they have their own.
        if known is not None and set(known.caches) == set(caches) and not is_full:
            return known
        self.settle()
        if shelf is None or not shelf.suits(caches):
            self._shelf = shelf_for(caches) if self.takes_parts else None
        if self._shelf is not None:
            caches = self._shelf.arrange(caches)
        if shelf is not None and shelf is not self._shelf:
            shelf.clear()
        self._together = made = SequencesCache(caches, shelf=self._shelf)
        return made

    def _run(self, rows: Rows, arguments: dict[str, Any]) -> Any:
        handle = getattr(self._model, "hybrimoe", None)
        if handle is None or not decides_by_rows(handle):
            return self._model(**arguments)
        return handle.run_rows(rows, self._model, **arguments)


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())


def _padding(lengths: torch.Tensor) -> torch.Tensor:
    """The mask [R, longest + 1] of a batch that is padded on the left; 1 for a token."""
    longest = int(lengths.max())
    places = torch.arange(longest + 1, device=lengths.device)
    return (places >= (longest - lengths)[:, None]).long()


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each one has gone."""
    return sorted(range(len(order)), key=order.__getitem__)
