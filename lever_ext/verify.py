"""One target pass over a token tree, and the accepted path brought to the front of the tree's rows
in the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.errors import SpeculationError
from lever_ext.early_exit.gate import ExitGate, Verdict
from lever_ext.tree.token_tree import TokenTree


@dataclass(frozen=True)
class Verified:
    """A finished pass."""

    hidden: torch.Tensor
    """Final hidden states [1, N', H] of the rows that were not pruned."""
    row_of: dict[int, int]
    """Row of the tree -> row of `hidden`; pruned rows are missing."""
    past: int
    """Tokens in the KV cache before the tree."""


class Verifier:
    """Runs trees through a causal LM of `transformers`.

    Args:
        model: any causal LM with full attention and a `DynamicCache`.
        gate: early-exit pruning, or None.
    """

    def __init__(self, model: Any, gate: ExitGate | None = None) -> None:
        self.model = model
        self.base = model.base_model
        self.head = model.get_output_embeddings()
        self.gate = gate
        self.cache_name = cache_name(self.base)

    def prefill(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run prompt ids [1, S] that the cache does not hold yet; the last row's hidden state [1,
        H].
        """
        return self._run(ids, cache).last_hidden_state[:, -1]

    def verify(
        self,
        tree: TokenTree,
        cache: Any,
        candidates: Sequence[Sequence[int]] = (),
        prune: bool = True,
    ) -> Verified:
        """Run all rows of a tree in one pass.

        Args:
            tree: at most as long as the model's context allows.
            cache: KV of everything before the root. Mutates: gets the tree's rows behind it.
            candidates: the draft's proposals after each row; pruning needs them.
            prune: False where the early exit shall only be judged.

        Raises:
            SpeculationError: a layer's cache has a sliding window, which a tree would tear.
        """
        past = int(cache.get_seq_length())
        ids = torch.tensor([tree.tokens])
        if len(tree) == 1:
            hidden = self._run(ids, cache).last_hidden_state
            return Verified(hidden, {0: 0}, past)
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise SpeculationError(
                "sliding-window attention cannot verify token trees; use --tree none"
            )
        gate = self.gate if candidates else None
        try:
            if gate is not None:
                gate.open(Verdict(tree, candidates, past, prune))
            positions = torch.from_numpy(tree.depths)[None] + past
            hidden = self._run(
                ids, cache, attention_mask=self._mask(tree, past), position_ids=positions
            ).last_hidden_state
            kept = gate.kept if gate is not None else None
        finally:
            if gate is not None:
                gate.close()
        rows = range(len(tree)) if kept is None else kept
        return Verified(hidden, {row: index for index, row in enumerate(rows)}, past)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [N, V] of hidden states [N, H]: projected on demand (paper 2c)."""
        logits: torch.Tensor = self.head(hidden).to(copy=True, dtype=torch.float32)
        return logits

    def mean_rows(self, verified: Verified, rows: int) -> int:
        """Rows that a layer computed on average in a pass over a tree of so many."""
        if self.gate is None or len(verified.row_of) == rows:
            return rows
        before = self.gate.predictor.layer / self.model.config.num_hidden_layers
        return round(before * rows + (1 - before) * len(verified.row_of))

    def place(self, cache: Any, verified: Verified, row: int, depth: int) -> None:
        """Bring the KV entries of an accepted row to where plain decoding has them: behind those of
        its ancestors.

        From the root on: a row lies no further to the front than its depth, so none is written over
        that may still be accepted. In place: earlier tokens are not copied.

        Args:
            row: of the tree.
            depth: tokens between the root and it, itself included.

        Mutates: the cache.
        """
        exit_layer = len(cache.layers) if self.gate is None else self.gate.predictor.layer
        place = verified.past + depth
        for index, layer in enumerate(cache.layers):
            found = verified.past + (verified.row_of[row] if index >= exit_layer else row)
            if found != place:
                layer.keys[:, :, place] = layer.keys[:, :, found]
                layer.values[:, :, place] = layer.values[:, :, found]

    def _run(self, ids: torch.Tensor, cache: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.base(input_ids=ids, use_cache=True, **{self.cache_name: cache}, **kwargs)

    def _mask(self, tree: TokenTree, past: int) -> torch.Tensor:
        """Additive mask [1, 1, N, past + N] in the model's dtype."""
        dtype = self.model.dtype
        mask = torch.zeros(1, 1, len(tree), past + len(tree), dtype=dtype)
        mask[0, 0, :, past:].masked_fill_(~torch.from_numpy(tree.mask), torch.finfo(dtype).min)
        return mask
