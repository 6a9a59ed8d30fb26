"""One run of `generate` by speculation: draft, verify, accept, learn, until generation ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from lever_ext.drafts.base import Draft
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.early_exit.rates import is_worthwhile
from lever_ext.speculation.accept import accept
from lever_ext.speculation.answer import Answer
from lever_ext.speculation.draft_ahead import OverlappedDrafting
from lever_ext.speculation.expert_reads import ExpertReads
from lever_ext.speculation.routing_forecast import RoutingForecast
from lever_ext.speculation.stats import Cycle, SpeculationStats
from lever_ext.speculation.verify import Verified, Verifier
from lever_ext.target import FlashTarget
from lever_ext.tree.calibrate import Calibration, Candidates
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.cost import CycleCost
from lever_ext.tree.growth import Growth
from lever_ext.tree.latency import LatencyTable
from lever_ext.tree.policies import TreePolicy
from lever_ext.tree.token_tree import TokenTree


@dataclass(frozen=True)
class Parts:
    """What a decoder lends to the run of one answer; see `LeverDecoding`."""

    draft: Draft | None
    policy: TreePolicy
    target: FlashTarget | None
    max_nodes: int
    overlap: bool
    prune: str
    calibration: Calibration
    latency: LatencyTable
    cost: CycleCost
    reads: ExpertReads | None
    """None for a dense target, or where experts are not priced."""
    forecast: RoutingForecast | None
    draft_ahead: OverlappedDrafting | None
    step: Callable[[Callable[[], bool]], bool]


class _Counts(NamedTuple):
    """Counters at some moment; a cycle reports what they grew by."""

    nbytes: float
    """Read from flash."""
    wait_us: float
    """Waited for reads."""
    ahead: int
    """Nodes drafted ahead."""


class SpeculativeRun:
    """One call of `generate`; `result` is what it returns.

    Args:
        parts: of the decoder. Mutates: it learns about costs and the draft.
        model: the target's.
        answer: with the prompt alone.
        stats: of this run. Mutates.
    """

    def __init__(
        self,
        parts: Parts,
        model: Any,
        answer: Answer,
        stats: SpeculationStats,
    ) -> None:
        self.parts = parts
        self.answer = answer
        self.stats = stats
        self.verifier = Verifier(model, None if parts.target is None else parts.target.gate)
        self.tree = CandidateTree(answer.last_token, parts.calibration)

    def result(self) -> Any:
        """Generate to the end."""
        step = self.parts.step
        try:
            done = step(self._exclusive(self._begin))
            while not done:
                done = step(self._exclusive(self._cycle))
            self.answer.end()
            return self.answer.output(self.verifier.cache_name)
        except BaseException:
            # The cache is the caller's, who may go on with it.
            self.answer.kept.drop_rest()
            raise

    def _exclusive(self, call: Callable[[], bool]) -> Callable[[], bool]:
        """The call while no other thread uses the target.

        The target's early exit, reads and counters are this cycle's until it ends.
        """
        target = self.parts.target
        return call if target is None else partial(target.turns.run, call)

    def _begin(self) -> bool:
        """The prompt's pass and the first token; whether generation has ended."""
        parts = self.parts
        begin = time.perf_counter()
        cache = self.answer.cache
        new_ids = self.answer.ids[:, cache.get_seq_length() :]
        hidden = self.verifier.prefill(new_ids, cache)
        prompt = self.answer.ids[0].tolist()
        done = self.answer.append(self.verifier.logits(hidden))
        self.stats.prefill_us = _us_since(begin)
        if parts.reads is not None:
            parts.reads.begin()
        if not parts.latency.cells:
            # Reads dominate the prompt's pass as they do every other, but it checks blocks and has
            # other shapes: it stands for a pass until one is measured, and is no measurement
            # itself.
            parts.latency.start_us = self.stats.prefill_us
        self.tree = CandidateTree(self.answer.last_token, parts.calibration)
        if isinstance(parts.draft, LanguageModelDraft):
            parts.draft.probe_with(parts.forecast)
        if parts.draft is not None and not done:
            parts.draft.start(prompt)
        return done

    def _cycle(self) -> bool:
        """Draft, verify, accept; whether generation has ended."""
        begin = time.perf_counter()
        before = self._counts()
        self._note_forecasts()
        growth = self._growth()
        tree = self.parts.policy.build(growth)
        draft_us = _us_since(begin)

        read_us = float(growth.cost.union.prefixes(tree.drafted)[-1])
        expected_us = growth.cost.verify(len(tree), tree.leaves) + read_us
        start = time.perf_counter()
        verified = self._verify(tree, growth.depth_limit, expected_us)
        verify_us = _us_since(start)

        start = time.perf_counter()
        path, done = accept(tree, verified, self.verifier, self.tree, self.answer)
        project_us = _us_since(start)
        self.answer.kept.drop_rest()

        self._learn(tree, verified, verify_us, path)
        self._advance(tree, path)
        after = self._counts()
        wait_us = after.wait_us - before.wait_us
        if self.parts.draft_ahead is not None:
            self.parts.draft_ahead.observe(verify_us, wait_us, growth.cost.draft_us(1))
        cycle = Cycle(
            nodes=len(tree),
            depth=int(tree.depths.max()),
            leaves=tree.leaves,
            kept=len(verified.row_of),
            accepted=len(path) - 1,
            draft_us=draft_us,
            verify_us=verify_us,
            wait_us=wait_us,
            project_us=project_us,
            total_us=_us_since(begin),
            predicted_us=draft_us + expected_us,
            nbytes=int(after.nbytes - before.nbytes),
            drafted=growth.nodes,
            drafted_ahead=after.ahead - before.ahead,
        )
        self.stats.cycles.append(cycle)
        self.parts.cost.observe_cycle(len(path), cycle.total_us)
        return done

    def _verify(self, tree: TokenTree, depth_limit: int, expected_us: float) -> Verified:
        """The target's pass; the next cycle is drafted meanwhile where that is worthwhile."""
        candidates, used = self._early_exit(tree)
        verify = partial(self.verifier.verify, tree, self.answer.cache, candidates, used)
        if self.parts.draft_ahead is None:
            return verify()
        with self.parts.draft_ahead.drafting(self.tree, depth_limit, expected_us):
            return verify()

    def _early_exit(self, tree: TokenTree) -> tuple[list[Sequence[int]], bool]:
        """(what the exit is asked about, whether its verdict counts).

        Asked about nothing where it is neither used nor judged.
        """
        gate = self.verifier.gate
        if gate is None or len(tree) == 1:
            return [], False
        if self.parts.prune == "always":
            return self._candidates(tree), True
        if gate.rates.due:
            return self._candidates(tree), False
        after = 1 - gate.predictor.layer / len(self.answer.cache.layers)
        if is_worthwhile(tree, self.parts.cost, gate.rates, after):
            return self._candidates(tree), True
        return [], False

    def _growth(self) -> Growth:
        """What the tree policy may do in this cycle."""
        draft = self.parts.draft
        if draft is None:
            return Growth(self.tree, _no_candidates, self.parts.cost, depth_limit=0, max_nodes=1)
        depth = self.answer.room
        if draft.context is not None:
            # A draft at the end of its context falls silent; the target goes on alone.
            depth = min(depth, draft.context - self.answer.ids.shape[1])
        return Growth(
            self.tree,
            self._expand,
            self.parts.cost,
            depth_limit=max(0, depth),
            max_nodes=self.parts.max_nodes,
        )

    def _expand(self, tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        assert self.parts.draft is not None
        found = self.parts.draft.expand(tree, keys)
        self._note_forecasts()
        return found

    def _note_forecasts(self) -> None:
        """Tell the cost of expert reads what the draft's hidden states forecast."""
        draft, reads = self.parts.draft, self.parts.reads
        if self.parts.forecast is None or reads is None:
            return
        if isinstance(draft, LanguageModelDraft):
            reads.note(draft.routing, self.tree.root, prefetch=self.parts.overlap)

    def _candidates(self, tree: TokenTree) -> list[Sequence[int]]:
        """What the draft proposed after each node; nothing for nodes that were not expanded."""
        found: list[Sequence[int]] = []
        for key in tree.keys:
            candidates = self.tree.nodes[key].candidates
            found.append(() if candidates is None else candidates.tokens)
        return found

    def _learn(
        self,
        tree: TokenTree,
        verified: Verified,
        verify_us: float,
        path: Sequence[int],
    ) -> None:
        """Let exit, reads and latency learn from a pass. Mutates: the parts."""
        if self.verifier.gate is not None and len(tree) > 1:
            self.verifier.gate.learn(path)
        if self.parts.reads is not None:
            self.parts.reads.learn(tree, verified, verify_us)
        nodes = self.verifier.mean_nodes(verified, len(tree))
        self.parts.latency.observe(nodes, tree.leaves, verify_us)

    def _advance(self, tree: TokenTree, path: Sequence[int]) -> None:
        """Step to the next root. Mutates: candidate tree and draft.

        Args:
            tree: that was verified.
            path: its accepted nodes, from the root on.
        """
        accepted = [tree.keys[node] for node in path]
        tokens = [tree.tokens[node] for node in path]
        self.tree.advance(accepted, self.answer.last_token)
        if self.parts.draft is not None:
            self.parts.draft.advance(accepted, tokens, self.tree)

    def _counts(self) -> _Counts:
        target, draft_ahead = self.parts.target, self.parts.draft_ahead
        ahead = 0 if draft_ahead is None else draft_ahead.nodes
        if target is None:
            return _Counts(0, 0, ahead)
        wait_us = target.stream.wait_us
        if target.experts is not None:
            wait_us += target.experts.counters.wait_us
        return _Counts(target.pack.reader.counters.nbytes, wait_us, ahead)


def _no_candidates(tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
    return []


def _us_since(begin: float) -> float:
    """Microseconds since a reading of the clock."""
    return (time.perf_counter() - begin) * 1e6
