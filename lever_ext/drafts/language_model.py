"""A small language model in DRAM as draft; it keeps the KV entries of the whole candidate tree.

    KV entries      the text so far     expanded nodes, in any order
                    |-----------------| root | A | B | C |
    advance to B:   |-----------------| root | B | C |        A's branch is dropped

Which entries a node sees, the mask says: those of the text, of its ancestors and its own.
"""

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


class RoutingProbe(Protocol):
    """A target's routers, applied to a draft's hidden states."""

    layers: tuple[int, ...]
    """Decoder layers whose FFN inputs it needs."""

    def __call__(self, inner: Sequence[torch.Tensor]) -> NDArray[np.int64]:
        """Expert ids [N, L, K] from the FFN inputs [N, H] of those layers."""
        ...


class LanguageModelDraft:
    """Any causal LM of `transformers` that shares the target's tokenizer.

    KV entries are those of the first committed tokens, then one for each expanded node. A token is
    committed once the target has accepted it.

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
        self.routing: dict[int, NDArray[np.int64]] = {}
        """Expanded node -> expert ids [L, K] that the probe forecasts for it."""
        self._proposed = self.vocabulary
        """Tokens that it may propose: the first ones."""
        self._runner = make_runner(model) if runner is None else runner
        self._head = model.get_output_embeddings()
        self._dtype: torch.dtype = model.dtype
        self._least = torch.finfo(self._dtype).min
        """Of the additive mask: an entry that is not seen."""
        self._tokens: list[int] = []
        """Before the root; the first `_committed` of them have KV entries."""
        self._entry_of: dict[int, int] = {}
        """Expanded node -> its KV entry."""
        self._probe: RoutingProbe | None = None
        self._whole = True
        """Whether the last change of KV entries, and of what is known about them, was completed."""

    @property
    def _committed(self) -> int:
        return self._runner.entries - len(self._entry_of)

    @property
    def can_probe(self) -> bool:
        """Whether hidden states can be given to a probe."""
        return isinstance(self._runner, DirectRunner)

    def probe_with(self, probe: RoutingProbe | None) -> None:
        """Give the hidden states of every node expanded from now on to a probe. Mutates."""
        self._probe = probe
        self.routing = {}
        if isinstance(self._runner, DirectRunner):
            layers = () if probe is None else probe.layers
            self._runner.tapped = frozenset(layers)

    def serve(self, vocabulary: int) -> None:
        """Propose only tokens of a target that has so many. Mutates.

        Raises:
            SpeculationError: the two vocabularies differ by more than padding.
        """
        if abs(self.vocabulary - vocabulary) > PADDING_ROWS:
            raise SpeculationError(
                f"the draft ({self.name}) has a vocabulary of {self.vocabulary} tokens and the "
                f"target one of {vocabulary}: they cannot share a tokenizer; choose a draft of the "
                f"target's family, or --draft ngram"
            )
        self._proposed = vocabulary

    def start(self, ids: Sequence[int]) -> None:
        known = self._committed if self._whole else 0
        common = _common_prefix(self._tokens[:known], ids)
        with self._changing():
            if common == 0:
                self._runner.reset()
            else:
                self._runner.keep(range(common))
            self._tokens = list(ids)
            self._entry_of = {}
            self.routing = {}

    def expand(
        self,
        tree: CandidateTree,
        keys: Sequence[int],
    ) -> list[Candidates]:
        is_root = list(keys) == [tree.root]
        if is_root and max(self._pending(tree)) >= self.vocabulary:
            return [Candidates((), ())]
        with self._changing():
            hidden = self._run_root(tree) if is_root else self._run_nodes(tree, keys)
        if self._probe is not None and isinstance(self._runner, DirectRunner):
            inner = [tap[-len(keys) :] for tap in self._runner.taps]
            routed = self._probe(inner)
            self.routing.update(zip(keys, routed, strict=True))
        return self._proposals(hidden)

    def advance(
        self,
        accepted: Sequence[int],
        tokens: Sequence[int],
        tree: CandidateTree,
    ) -> None:
        committed = self._committed
        # The last accepted node may never have been expanded; its token waits for the next root's
        # pass.
        path = [self._entry_of[key] for key in accepted if key in self._entry_of]
        alive = [key for key in self._entry_of if key in tree.nodes]
        entries = [*range(committed), *path]
        entries += [self._entry_of[key] for key in alive]
        first = committed + len(path)
        with self._changing():
            if self._runner.entries:
                self._runner.keep(entries)
            self.routing = {key: ids for key, ids in self.routing.items() if key in tree.nodes}
            self._tokens += tokens
            self._entry_of = {key: entry for entry, key in enumerate(alive, start=first)}

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """While KV entries and what is known about them change.

        The next answer after one that was cut off here begins anew.
        """
        self._whole = False
        yield
        self._whole = True

    def _proposals(self, hidden: torch.Tensor) -> list[Candidates]:
        """The likeliest tokens after hidden states [N, H]."""
        with torch.inference_mode():
            shares = torch.softmax(self._head(hidden).float(), dim=-1)
            values, tokens = shares[:, : self._proposed].topk(self.candidates, dim=-1)
        found = []
        for likeliest, probabilities in zip(tokens.tolist(), values.tolist(), strict=True):
            found.append(Candidates(tuple(likeliest), tuple(probabilities)))
        return found

    def _run_root(self, tree: CandidateTree) -> torch.Tensor:
        """Catch up with the committed tokens, then run the root; its hidden state [1, H].

        Each token sees all those before it and itself.
        """
        assert not self._entry_of, "a root without KV has no expanded nodes below it"
        first = self._runner.entries
        pending = self._pending(tree)
        end = first + len(pending)
        self._entry_of[tree.root] = end - 1
        positions = torch.arange(first, end)
        later = torch.arange(end)[None] > positions[:, None]
        mask = torch.zeros(later.shape, dtype=self._dtype)
        mask.masked_fill_(later, self._least)
        return self._runner.run(pending, positions, mask)[-1:]

    def _pending(self, tree: CandidateTree) -> list[int]:
        """The tokens up to the root that have no KV entries."""
        root = tree.nodes[tree.root].token
        return [*self._tokens[self._runner.entries :], root]

    def _run_nodes(self, tree: CandidateTree, keys: Sequence[int]) -> torch.Tensor:
        """Run some nodes in one call; their hidden states [N, H].

        Their ancestors were run before. Each node sees the committed tokens, its ancestors and
        itself.
        """
        first = self._runner.entries
        committed = self._committed
        nodes = [tree.nodes[key] for key in keys]
        mask = torch.full((len(keys), first + len(keys)), self._least, dtype=self._dtype)
        mask[:, :committed] = 0
        for index, key in enumerate(keys):
            ancestors = tree.path(key)[:-1]
            seen = [self._entry_of[ancestor] for ancestor in ancestors]
            mask[index, [*seen, first + index]] = 0
        positions = torch.tensor([len(self._tokens) + node.depth for node in nodes])
        hidden = self._runner.run([node.token for node in nodes], positions, mask)
        for index, key in enumerate(keys):
            self._entry_of[key] = first + index
        return hidden


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two texts have in common."""
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    return common


def vocabulary_of(model: Any) -> int:
    """Tokens that a model of `transformers` knows."""
    return int(model.config.get_text_config().vocab_size)
