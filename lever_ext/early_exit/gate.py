"""The place in the target where a tree may be pruned: between two decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings, kept_rows
from lever_ext.early_exit.rates import ExitRates, lost_share
from lever_ext.tree.token_tree import TokenTree


class Verdict(NamedTuple):
    """What the gate is asked about one pass."""

    tree: TokenTree
    candidates: Sequence[Sequence[int]]
    """For each row, the draft's candidates after it; those outside the tree are shadow tokens:
    denominator only.
    """
    past: int
    """Tokens in the KV cache before the tree."""
    use: bool = True
    """False: all rows go on, and what would have been dropped is only remembered."""


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
        """Rows that the layers from the exit on computed; None for all."""
        self._judged: list[int] | None = None
        self._last: Verdict | None = None
        self._asked: Verdict | None = None
        self._narrowed: dict[str, Any] = {}

    def open(self, asked: Verdict) -> None:
        """Announce a tree pass. Mutates."""
        self._asked, self._last, self.kept, self._judged, self._narrowed = (
            asked,
            asked,
            None,
            None,
            {},
        )

    def close(self) -> None:
        """End the pass: other passes go through untouched. Mutates."""
        self._asked = None

    def learn(self, path: Sequence[int]) -> None:
        """Compare the last pass's verdict with the rows that the target accepted, from the root on.
        Mutates: the rates.

        A pass that the exit was not asked about only counts.
        """
        last, self._last = self._last, None
        if last is None:
            self.rates.skip()
            return
        rows = len(last.tree) if self._judged is None else len(self._judged)
        self.rates.observe(
            rows / len(last.tree), None if last.use else lost_share(path, self._judged)
        )

    def enter(
        self, layer: int, hidden: torch.Tensor, kwargs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Hidden states [1, N, H] and keyword arguments as the layer shall get them."""
        if self._asked is None or layer < self.predictor.layer:
            return hidden, dict(kwargs)
        if layer == self.predictor.layer:
            self._judged = kept_rows(
                self._asked.tree, self._edges(self._asked, hidden[0]), self.settings
            )
            if self._judged is not None and self._asked.use:
                self.kept = self._judged
                hidden = hidden[:, self.kept]
                self._narrowed = _narrow(kwargs, self.kept, self._asked.past)
        return hidden, {**kwargs, **self._narrowed}

    def _edges(self, asked: Verdict, hidden: torch.Tensor) -> list[float]:
        """Probability of each row's token among its parent's candidates, in the tree or not."""
        edges = [1.0] * len(asked.tree)
        hidden = hidden.to(self.predictor.weight.device)
        for row, children in enumerate(asked.tree.children):
            if not children:
                continue
            tokens = list(dict.fromkeys([*children, *asked.candidates[row]]))
            shares = torch.softmax(self.predictor.scores(hidden[row], tokens), dim=0).tolist()
            for token, share in zip(tokens, shares, strict=True):
                if token in children:
                    edges[children[token]] = share
        return edges


def _narrow(kwargs: Mapping[str, Any], kept: Sequence[int], past: int) -> dict[str, Any]:
    """The keyword arguments of a decoder layer for some rows only."""
    rows = torch.as_tensor(kept)
    changed: dict[str, Any] = {}
    mask = kwargs.get("attention_mask")
    if mask is not None:
        columns = torch.cat([torch.arange(past), past + rows])
        changed["attention_mask"] = mask[:, :, rows][:, :, :, columns]
    if kwargs.get("position_ids") is not None:
        changed["position_ids"] = kwargs["position_ids"][:, rows]
    if kwargs.get("position_embeddings") is not None:
        changed["position_embeddings"] = tuple(
            part[:, rows] for part in kwargs["position_embeddings"]
        )
    return changed
