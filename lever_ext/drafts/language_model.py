"""A small language model in DRAM as draft; it keeps the KV entries of the whole candidate tree."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.errors import SpeculationError
from hybrimoe_plugin.families.agreement import PADDING_ROWS
from lever_ext.drafts.runner import DirectRunner, Runner, make_runner
from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree


class Watcher(Protocol):
    """A target's routers, applied to a draft's hidden states."""

    layers: tuple[int, ...]
    """Decoder layers whose FFN inputs it wants to see."""

    def __call__(self, inner: Sequence[torch.Tensor]) -> NDArray[np.int64]:
        """Expert ids [N, L, K] from the FFN inputs [N, H] of those layers."""
        ...


class LanguageModelDraft:
    """Any causal LM of `transformers` that shares the target's tokenizer.

    KV rows are those of the first committed tokens, then one for each expanded node, in any order.

    Args:
        model: on the CPU, with full attention.
        name: for reports.
        candidates: proposals for each node.
        runner: runs the model; by default the leanest that knows it.
    """

    def __init__(
        self,
        model: Any,
        name: str = "language model",
        candidates: int = 8,
        runner: Runner | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.lock = threading.RLock()
        self.candidates = candidates
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self.vocabulary = vocabulary_of(model)
        """Tokens that it knows: it proposes nothing after a text with others."""
        self._proposed = self.vocabulary
        """Tokens that it may propose: the first ones."""
        self._runner = make_runner(model) if runner is None else runner
        self._head = model.get_output_embeddings()
        self._dtype: torch.dtype = model.dtype
        self._tokens: list[int] = []
        """Before the root; the first `_committed` of them have KV rows."""
        self._row_of: dict[int, int] = {}
        self.routing: dict[int, NDArray[np.int64]] = {}
        """Expanded node -> expert ids [L, K] that are forecast for it, while somebody watches."""
        self._watcher: Watcher | None = None
        self._whole = True
        """Whether the last change of KV rows and of what is known about them came to its end."""

    @property
    def _committed(self) -> int:
        return self._runner.rows - len(self._row_of)

    @property
    def can_watch(self) -> bool:
        """Whether hidden states can be shown to a watcher."""
        return isinstance(self._runner, DirectRunner)

    def watch(self, watcher: Watcher | None) -> None:
        """Show a target's routers the hidden states of every node expanded from now on. Mutates."""
        self._watcher = watcher
        self.routing = {}
        if isinstance(self._runner, DirectRunner):
            self._runner.tapped = frozenset() if watcher is None else frozenset(watcher.layers)

    def serve(self, vocabulary: int) -> None:
        """Propose only tokens of a target that has so many. Mutates.

        Raises:
            SpeculationError: the two vocabularies differ by more than padding.
        """
        if abs(self.vocabulary - vocabulary) > PADDING_ROWS:
            raise SpeculationError(
                f"the draft ({self.name}) has a vocabulary of {self.vocabulary} tokens and the "
                f"target one of "
                f"{vocabulary}: they cannot share a tokenizer; choose a draft of the target's "
                f"family, or --draft ngram"
            )
        self._proposed = vocabulary

    def start(self, ids: Sequence[int]) -> None:
        common, known = 0, self._committed if self._whole else 0
        while common < min(known, len(ids)) and self._tokens[common] == ids[common]:
            common += 1
        with self._changing():
            if common == 0:
                self._runner.reset()
            else:
                self._runner.keep(range(common))
            self._tokens, self._row_of, self.routing = list(ids), {}, {}

    def expand(self, tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        root = list(keys) == [tree.root]
        if root and max(self._pending(tree)) >= self.vocabulary:
            return [Candidates((), ())]
        with self._changing():
            hidden = self._run_root(tree) if root else self._run_nodes(tree, keys)
        if self._watcher is not None and isinstance(self._runner, DirectRunner):
            routed = self._watcher([tap[-len(keys) :] for tap in self._runner.taps])
            self.routing.update(zip(keys, routed, strict=True))
        with torch.inference_mode():
            shares = torch.softmax(self._head(hidden).float(), dim=-1)
            values, tokens = shares[:, : self._proposed].topk(self.candidates, dim=-1)
        return [
            Candidates(tuple(t), tuple(v))
            for t, v in zip(tokens.tolist(), values.tolist(), strict=True)
        ]

    def advance(self, accepted: Sequence[int], tokens: Sequence[int], tree: CandidateTree) -> None:
        committed = self._committed
        # The last accepted node may never have been expanded; its token waits for the next root's
        # pass.
        path = [self._row_of[key] for key in accepted if key in self._row_of]
        alive = [key for key in self._row_of if key in tree.nodes]
        with self._changing():
            if self._runner.rows:
                self._runner.keep([*range(committed), *path, *(self._row_of[key] for key in alive)])
            self.routing = {key: ids for key, ids in self.routing.items() if key in tree.nodes}
            self._tokens += tokens
            self._row_of = {key: committed + len(path) + index for index, key in enumerate(alive)}

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """While KV rows and what is known about them change: an answer after one that was cut off
        here begins anew.
        """
        self._whole = False
        yield
        self._whole = True

    def _run_root(self, tree: CandidateTree) -> torch.Tensor:
        """Catch up with the committed tokens, then the root; its hidden state [1, H]."""
        assert not self._row_of, "a root without KV has no expanded nodes below it"
        first, pending = self._runner.rows, self._pending(tree)
        self._row_of[tree.root] = first + len(pending) - 1
        positions = torch.arange(first, first + len(pending))
        hidden_from = torch.arange(first + len(pending))[None] > positions[:, None]
        mask = torch.zeros(hidden_from.shape, dtype=self._dtype).masked_fill_(
            hidden_from, self._least
        )
        return self._runner.run(pending, positions, mask)[-1:]

    def _pending(self, tree: CandidateTree) -> list[int]:
        """The tokens up to the root that have no KV rows."""
        return [*self._tokens[self._runner.rows :], tree.nodes[tree.root].token]

    def _run_nodes(self, tree: CandidateTree, keys: Sequence[int]) -> torch.Tensor:
        rows, committed = self._runner.rows, self._committed
        mask = torch.full((len(keys), rows + len(keys)), self._least, dtype=self._dtype)
        mask[:, :committed] = 0
        for index, key in enumerate(keys):
            seen = [self._row_of[ancestor] for ancestor in tree.path(key)[:-1]]
            mask[index, [*seen, rows + index]] = 0
        positions = torch.tensor([len(self._tokens) + tree.nodes[key].depth for key in keys])
        hidden = self._runner.run([tree.nodes[key].token for key in keys], positions, mask)
        self._row_of.update({key: rows + index for index, key in enumerate(keys)})
        return hidden

    @property
    def _least(self) -> float:
        return torch.finfo(self._dtype).min


def vocabulary_of(model: Any) -> int:
    """Tokens that a model of `transformers` knows."""
    return int(model.config.get_text_config().vocab_size)
