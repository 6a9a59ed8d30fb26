"""One target pass over a token tree, and the accepted path moved to the front in the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from hybrimoe_plugin.compute.attention.kept_entries import can_be_cut
from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.errors import SpeculationError
from lever_ext.early_exit.gate import ExitGate, ExitQuery
from lever_ext.tree.token_tree import TokenTree

NO_TREES = (
    "models with sliding windows or linear attention cannot verify token trees: a branch that is "
    "not accepted could not be taken back"
)


def takes_trees(model: Any) -> bool:
    """Whether a causal language model's cache lets token trees be verified."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return all(map(can_be_cut, cache.layers))


@dataclass(frozen=True)
class Verified:
    """A finished pass."""

    hidden: torch.Tensor
    """Final hidden states [1, N', H] of the nodes that were not pruned."""
    row_of: dict[int, int]
    """Node of the tree -> its row of `hidden`; pruned nodes are missing."""
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
        """Run prompt ids [1, S] that the cache does not hold yet.

        Returns:
            the last token's hidden state, [1, H].
        """
        hidden: torch.Tensor = self._run(ids, cache).last_hidden_state
        return hidden[:, -1]

    def verify(
        self,
        tree: TokenTree,
        cache: Any,
        candidates: Sequence[Sequence[int]] = (),
        prune: bool = True,
    ) -> Verified:
        """Run all nodes of a tree in one pass.

        Args:
            tree: at most as long as the model's context allows.
            cache: KV of everything before the root. Mutates: gets the tree's entries behind it.
            candidates: the draft's proposals after each node; pruning needs them.
            prune: False where the early exit shall only be judged.

        Raises:
            SpeculationError: a layer's cache keeps something else than keys and values of all
                tokens, such as a sliding window, which a tree would tear.
        """
        past = int(cache.get_seq_length())
        ids = torch.tensor([tree.tokens])
        if len(tree) == 1:
            hidden = self._run(ids, cache).last_hidden_state
            return Verified(hidden, {0: 0}, past)
        if not all(map(can_be_cut, cache.layers)):
            raise SpeculationError(f"{NO_TREES}; use --tree none")
        positions = torch.from_numpy(tree.depths)[None] + past
        mask = self._mask(tree, past)
        gate = self.gate if candidates else None
        kept: Sequence[int] | None = None
        try:
            if gate is not None:
                gate.open(ExitQuery(tree, candidates, past, prune))
            output = self._run(ids, cache, attention_mask=mask, position_ids=positions)
            if gate is not None:
                kept = gate.kept
        finally:
            if gate is not None:
                gate.close()
        nodes = range(len(tree)) if kept is None else kept
        row_of = {node: row for row, node in enumerate(nodes)}
        return Verified(output.last_hidden_state, row_of, past)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [N, V] of hidden states [N, H]: projected on demand (paper 2c)."""
        logits: torch.Tensor = self.head(hidden).to(copy=True, dtype=torch.float32)
        return logits

    def mean_nodes(self, verified: Verified, nodes: int) -> int:
        """Nodes that a layer computed on average in a pass.

        Args:
            verified: the pass.
            nodes: of its tree.
        """
        kept = len(verified.row_of)
        if self.gate is None or kept == nodes:
            return nodes
        before = self.gate.predictor.layer / self.model.config.num_hidden_layers
        return round(before * nodes + (1 - before) * kept)

    def place(self, cache: Any, verified: Verified, node: int, depth: int) -> None:
        """Move the KV entries of an accepted node behind those of its ancestors.

        There plain decoding has them. Called from the root on: a node lies no further to the front
        than its depth, so no entry is overwritten that may still be accepted.

            before   past | root A  B  C  D        accepted: root, B, D
            after    past | root B  D  C  D        the rest is dropped later

        In place: earlier tokens are not copied.

        Args:
            cache: of the pass. Mutates.
            verified: the pass.
            node: of the tree.
            depth: tokens between the root and it, itself included.
        """
        exit_layer = len(cache.layers) if self.gate is None else self.gate.predictor.layer
        place = verified.past + depth
        for index, layer in enumerate(cache.layers):
            row = verified.row_of[node] if index >= exit_layer else node
            found = verified.past + row
            if found != place:
                layer.keys[:, :, place] = layer.keys[:, :, found]
                layer.values[:, :, place] = layer.values[:, :, found]

    def _run(self, ids: torch.Tensor, cache: Any, **kwargs: Any) -> Any:
        kwargs[self.cache_name] = cache
        with torch.no_grad():
            return self.base(input_ids=ids, use_cache=True, **kwargs)

    def _mask(self, tree: TokenTree, past: int) -> torch.Tensor:
        """Additive mask [1, 1, N, past + N] in the model's dtype."""
        dtype = self.model.dtype
        size = len(tree)
        hidden_from = ~torch.from_numpy(tree.mask)
        mask = torch.zeros(1, 1, size, past + size, dtype=dtype)
        mask[0, 0, :, past:].masked_fill_(hidden_from, torch.finfo(dtype).min)
        return mask
