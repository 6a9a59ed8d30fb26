"""A small language model in DRAM as draft; it keeps the KV entries of the whole candidate tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree
from lever_ext.verify import cache_name


class LanguageModelDraft:
    """Any causal LM of `transformers` that shares the target's tokenizer.

    KV rows are those of the first committed tokens, then one for each expanded node, in any order: attention needs
    only a mask and positions.

    Args:
        model: on the CPU, with full attention.
        name: for reports.
        candidates: proposals for each node.
    """

    def __init__(self, model: Any, name: str = "language model", candidates: int = 8) -> None:
        self.model = model
        self.name = name
        self.candidates = candidates
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._base = model.base_model
        self._head = model.get_output_embeddings()
        self._cache_name = cache_name(self._base)
        self._cache: Any = None
        self._tokens: list[int] = []
        """Before the root; the first `_rows - len(_row_of)` of them have KV rows."""
        self._row_of: dict[int, int] = {}

    @property
    def _rows(self) -> int:
        return int(self._cache.get_seq_length()) if self._cache is not None else 0

    def start(self, ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        common = 0
        known = self._rows - len(self._row_of)
        while common < min(known, len(ids)) and self._tokens[common] == ids[common]:
            common += 1
        if common == 0:
            self._cache = DynamicCache(config=self.model.config)
        else:
            self._keep(list(range(common)))
        self._tokens, self._row_of = list(ids), {}

    def expand(self, tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        if list(keys) == [tree.root]:
            pending = [*self._tokens[self._rows - len(self._row_of) :], tree.nodes[tree.root].token]
            assert not self._row_of, "a root without KV has no expanded nodes below it"
            self._row_of[tree.root] = self._rows + len(pending) - 1
            hidden = self._run(pending)[-1:]
        else:
            hidden = self._run_nodes(tree, keys)
        with torch.no_grad():
            shares = torch.softmax(self._head(hidden).float(), dim=-1)
        values, tokens = shares.topk(self.candidates, dim=-1)
        return [Candidates(tuple(t), tuple(v)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]

    def advance(self, accepted: Sequence[int], tokens: Sequence[int], tree: CandidateTree) -> None:
        committed = self._rows - len(self._row_of)
        # The last accepted node may never have been expanded; its token waits for the next root's pass.
        path = [self._row_of[key] for key in accepted if key in self._row_of]
        alive = [key for key in self._row_of if key in tree.nodes]
        if alive or path:
            self._keep([*range(committed), *path, *(self._row_of[key] for key in alive)])
        self._tokens += tokens
        self._row_of = {key: committed + len(path) + index for index, key in enumerate(alive)}

    def _run(self, tokens: Sequence[int], **kwargs: Any) -> torch.Tensor:
        """Final hidden states [N, H]."""
        with torch.no_grad():
            output = self._base(
                input_ids=torch.tensor([tokens]), use_cache=True, **{self._cache_name: self._cache}, **kwargs
            )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _run_nodes(self, tree: CandidateTree, keys: Sequence[int]) -> torch.Tensor:
        rows, committed = self._rows, self._rows - len(self._row_of)
        mask = torch.full(
            (1, 1, len(keys), rows + len(keys)), torch.finfo(self.model.dtype).min, dtype=self.model.dtype
        )
        mask[..., :committed] = 0
        for index, key in enumerate(keys):
            seen = [self._row_of[ancestor] for ancestor in tree.path(key)[:-1]]
            mask[0, 0, index, [*seen, rows + index]] = 0
        positions = torch.tensor([[len(self._tokens) + tree.nodes[key].depth for key in keys]])
        tokens = [tree.nodes[key].token for key in keys]
        hidden = self._run(tokens, attention_mask=mask, position_ids=positions)
        self._row_of.update({key: rows + index for index, key in enumerate(keys)})
        return hidden

    def _keep(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(self._rows)):
            return
        index = torch.as_tensor(rows)
        for layer in self._cache.layers:
            layer.keys = layer.keys.index_select(2, index)
            layer.values = layer.values.index_select(2, index)
