"""The place in the target where a tree may be pruned: between two decoder layers.

layers before the exit     all N nodes of the tree
---------- gate ---------- scores the edges, keeps N' <= N nodes
layers from the exit on    N' nodes: hidden states, mask and positions are narrowed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings, kept_nodes
from lever_ext.early_exit.rates import ExitRates, lost_share
from lever_ext.tree.token_tree import TokenTree


class ExitQuery(NamedTuple):
    """What the gate is asked about one pass."""

    tree: TokenTree
    candidates: Sequence[Sequence[int]]
    """For each node, the draft's candidates after it. Those outside the tree are shadow tokens:
    they count in the denominator only.
    """
    past: int
    """Tokens in the KV cache before the tree."""
    use: bool = True
    """False: all nodes go on, and what would have been dropped is only remembered."""


class ExitGate:
    """Prunes the tree of the current pass at one layer and narrows what the later layers get.

    Args:
        predictor: scores edges from the hidden state that enters its layer.
        settings: thresholds and safeguards.
    """

    def __init__(self, predictor: ExitPredictor, settings: PruneSettings) -> None:
        self.predictor = predictor
        self.settings = settings
        self.rates = ExitRates()
        self.kept: list[int] | None = None
        """Nodes that the layers from the exit on computed; None for all."""
        self._judged: list[int] | None = None
        """Nodes that the last query would keep, used or not; None for all."""
        self._last: ExitQuery | None = None
        """The last query, until `learn`."""
        self._open: ExitQuery | None = None
        """The query of the running pass."""
        self._narrowed: dict[str, Any] = {}
        """Keyword arguments of the layers from the exit on."""

    def open(self, query: ExitQuery) -> None:
        """Announce a tree pass. Mutates."""
        self._open = query
        self._last = query
        self.kept = None
        self._judged = None
        self._narrowed = {}

    def close(self) -> None:
        """End the pass: other passes go through untouched. Mutates."""
        self._open = None

    def learn(self, path: Sequence[int]) -> None:
        """Compare the last pass's verdict with the nodes that the target accepted.

        A pass that the exit was not asked about only counts.

        Args:
            path: accepted nodes from the root on.

        Mutates: the rates.
        """
        last = self._last
        self._last = None
        if last is None:
            self.rates.skip()
            return
        nodes = len(last.tree)
        kept = nodes if self._judged is None else len(self._judged)
        lost = None if last.use else lost_share(path, self._judged)
        self.rates.observe(kept / nodes, lost)

    def enter(
        self,
        layer: int,
        hidden: torch.Tensor,
        kwargs: Mapping[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Hidden states [1, N, H] and keyword arguments as the layer shall get them."""
        query = self._open
        if query is None or layer < self.predictor.layer:
            return hidden, dict(kwargs)
        if layer == self.predictor.layer:
            edges = self._edges(query, hidden[0])
            self._judged = kept_nodes(query.tree, edges, self.settings)
            if self._judged is not None and query.use:
                self.kept = self._judged
                hidden = hidden[:, self.kept]
                self._narrowed = _narrow(kwargs, self.kept, query.past)
        return hidden, {**kwargs, **self._narrowed}

    def _edges(self, query: ExitQuery, hidden: torch.Tensor) -> list[float]:
        """Probability of each node's token among its parent's candidates, in the tree or not."""
        edges = [1.0] * len(query.tree)
        hidden = hidden.to(self.predictor.weight.device)
        for node, children in enumerate(query.tree.children):
            if not children:
                continue
            tokens = list(dict.fromkeys([*children, *query.candidates[node]]))
            scores = self.predictor.scores(hidden[node], tokens)
            shares = torch.softmax(scores, dim=0).tolist()
            for token, share in zip(tokens, shares, strict=True):
                if token in children:
                    edges[children[token]] = share
        return edges


def _narrow(kwargs: Mapping[str, Any], kept: Sequence[int], past: int) -> dict[str, Any]:
    """The keyword arguments of a decoder layer for some nodes only.

    Args:
        kwargs: for all nodes; `attention_mask` is [1, 1, N, past + N].
        kept: the nodes.
        past: tokens in the KV cache before the tree.
    """
    rows = torch.as_tensor(kept)
    changed: dict[str, Any] = {}
    mask = kwargs.get("attention_mask")
    if mask is not None:
        columns = torch.cat([torch.arange(past), past + rows])
        changed["attention_mask"] = mask[:, :, rows][:, :, :, columns]
    positions = kwargs.get("position_ids")
    if positions is not None:
        changed["position_ids"] = positions[:, rows]
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None:
        changed["position_embeddings"] = tuple(part[:, rows] for part in embeddings)
    return changed
