"""One run of `generate` by speculation: draft, verify, accept, learn, until generation ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.errors import SpeculationError
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.early_exit.rates import pays
from lever_ext.kept_rows import KeptRows
from lever_ext.stats import Cycle, SpeculationStats
from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.growth import Growth
from lever_ext.tree.token_tree import TokenTree
from lever_ext.verify import Verified, Verifier

if TYPE_CHECKING:
    from lever_ext.decoding import LeverDecoding

AT_ONCE = 3
"""Rows of the likeliest path that are projected in one product: as many as take no longer than one.
"""


class SpeculativeRun:
    """One call of `generate`; `result` is what it returns."""

    def __init__(
        self,
        owner: LeverDecoding,
        model: Any,
        ids: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        kwargs: dict[str, Any],
    ) -> None:
        self.owner = owner
        self.ids = ids
        self.processors = processors
        self.criteria = criteria
        self.config = config
        self.verifier = Verifier(model, owner.target.gate if owner.target is not None else None)
        self.cache = _cache(model, kwargs)
        self.kept = KeptRows(self.cache)
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        target, draft = owner.target, owner.draft
        throttle = target.pack.reader.throttle if target is not None else None
        self.stats = SpeculationStats(
            draft="none" if draft is None else draft.name,
            tree=owner.policy.name,
            prompt_tokens=ids.shape[1],
            label=throttle.label if throttle is not None else "measured",
        )
        owner.stats = self.stats

    def result(self) -> Any:
        try:
            done = self.owner.step(self._in_turn(self._begin))
            while not done:
                done = self.owner.step(self._in_turn(self._cycle))
            if self.owner.streamer is not None:
                self.owner.streamer.end()
            return self._output()
        except BaseException:
            self.kept.drop_rest()  # the cache is the caller's, who may go on with it
            raise

    def _in_turn(self, call: Callable[[], bool]) -> Callable[[], bool]:
        """The call as one turn on the target: its early exit, reads and counters are this cycle's
        till the end.
        """
        target = self.owner.target
        return call if target is None else partial(target.turns.run, call)

    def _begin(self) -> bool:
        """The prompt's pass and the first token; whether generation has ended."""
        begin = time.perf_counter()
        hidden = self.verifier.prefill(self.ids[:, self.cache.get_seq_length() :], self.cache)
        done = self._append(self.verifier.logits(hidden))
        self.stats.prefill_us = (time.perf_counter() - begin) * 1e6
        if self.owner.reads is not None:
            self.owner.reads.begin()
        if not self.owner.latency.cells:
            # Reads dominate the prompt's pass as they do every other, but it checks blocks and has
            # other shapes: it stands for a pass until one is measured, and is no measurement
            # itself.
            self.owner.latency.start_us = self.stats.prefill_us
        self.tree = CandidateTree(int(self.ids[0, -1]), self.owner.calibration)
        if isinstance(self.owner.draft, LanguageModelDraft):
            self.owner.draft.watch(self.owner.forecast)
        if self.owner.draft is not None and not done:
            self.owner.draft.start(self.ids[0, :-1].tolist())
        return done

    def _cycle(self) -> bool:
        """Draft, verify, accept; whether generation has ended."""
        begin, before = time.perf_counter(), self._counts()
        self._note_forecasts()
        growth = self._growth()
        tree = self.owner.policy.build(growth)
        draft_us = (time.perf_counter() - begin) * 1e6
        predicted = growth.cost.verify(len(tree), tree.leaves) + float(
            growth.cost.union.prefixes(tree.drafted)[-1]
        )
        start = time.perf_counter()
        verified = self._verify(tree, growth.depth_limit, predicted)
        verify_us = (time.perf_counter() - start) * 1e6
        start = time.perf_counter()
        path, done = self._accept(tree, verified)
        project_us = (time.perf_counter() - start) * 1e6
        self.kept.drop_rest()
        self._learn(tree, verified, verify_us, path)
        self._advance([tree.keys[row] for row in path], [tree.tokens[row] for row in path])
        after = self._counts()
        if self.owner.ahead is not None:
            self.owner.ahead.observe(verify_us, after[1] - before[1], growth.cost.draft_us(1))
        cycle = Cycle(
            rows=len(tree),
            depth=int(tree.depths.max()),
            leaves=tree.leaves,
            kept=len(verified.row_of),
            accepted=len(path) - 1,
            draft_us=draft_us,
            verify_us=verify_us,
            wait_us=after[1] - before[1],
            project_us=project_us,
            total_us=(time.perf_counter() - begin) * 1e6,
            predicted_us=draft_us + predicted,
            nbytes=int(after[0] - before[0]),
            drafted=growth.nodes,
            ahead=int(after[2] - before[2]),
        )
        self.stats.cycles.append(cycle)
        self.owner.cost.observe_cycle(len(path), cycle.total_us)
        return done

    def _verify(self, tree: TokenTree, depth_limit: int, expected_us: float) -> Verified:
        candidates, used = self._early_exit(tree)
        ahead = self.owner.ahead
        if ahead is None:
            return self.verifier.verify(tree, self.cache, candidates, used)
        with ahead.drafting(self.tree, depth_limit, expected_us):
            return self.verifier.verify(tree, self.cache, candidates, used)

    def _early_exit(self, tree: TokenTree) -> tuple[list[Sequence[int]], bool]:
        """(what the exit is asked about, whether its verdict counts); nothing where it is neither
        used nor judged.
        """
        gate = self.verifier.gate
        if gate is None or len(tree) == 1:
            return [], False
        after = 1 - gate.predictor.layer / len(self.cache.layers)
        due = gate.rates.due and self.owner.prune != "always"
        used = self.owner.prune == "always" or (
            not due and pays(tree, self.owner.cost, gate.rates, after)
        )
        return (self._candidates(tree) if used or due else []), used

    def _growth(self) -> Growth:
        length, draft = self.ids.shape[1], self.owner.draft
        depth = int(self.config.max_length) - length - 1
        if draft is None:
            return Growth(self.tree, lambda tree, keys: [], self.owner.cost, 0, 1)
        if draft.context is not None:
            # A draft at the end of its context falls silent; the target goes on alone.
            depth = min(depth, draft.context - length)
        return Growth(self.tree, self._expand, self.owner.cost, max(0, depth), self.owner.max_rows)

    def _expand(self, tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        assert self.owner.draft is not None
        found = self.owner.draft.expand(tree, keys)
        self._note_forecasts()
        return found

    def _note_forecasts(self) -> None:
        draft, reads = self.owner.draft, self.owner.reads
        if (
            self.owner.forecast is not None
            and isinstance(draft, LanguageModelDraft)
            and reads is not None
        ):
            reads.note(draft.routing, self.tree.root, self.owner.overlap)

    def _candidates(self, tree: TokenTree) -> list[Sequence[int]]:
        found = (self.tree.nodes[key].candidates for key in tree.keys)
        return [() if candidates is None else candidates.tokens for candidates in found]

    def _accept(self, tree: TokenTree, verified: Verified) -> tuple[list[int], bool]:
        """Rows from the root to the last node that the target itself chose, and whether generation
        has ended.
        """
        row, path, logits = 0, [0], dict[int, torch.Tensor]()
        while True:
            if row not in logits:
                rows = _likeliest_path(tree, verified, row)
                hidden = verified.hidden[0, [verified.row_of[likely] for likely in rows]]
                logits.update(zip(rows, self.verifier.logits(hidden).split(1), strict=True))
            self.verifier.place(self.cache, verified, row, len(path) - 1)
            done = self._append(logits[row])
            token = int(self.ids[0, -1])
            candidates = self.tree.nodes[tree.keys[row]].candidates
            if candidates is not None:
                self.owner.calibration.observe(candidates, token)
            child = tree.children[row].get(token)
            if done or child is None or child not in verified.row_of:
                return path, done
            row = child
            path.append(row)

    def _append(self, logits: torch.Tensor) -> bool:
        """Choose the next token by float32 logits [1, V] as `generate` would; whether generation
        has ended.

        The cache's first rows must be those of all tokens before it: they are kept from here on.
        """
        scores = self.processors(self.ids, logits) if self.processors is not None else logits
        if self.config.do_sample:
            token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        if self.config.return_dict_in_generate:
            if self.config.output_scores:
                self.scores.append(scores)
            if self.config.output_logits:
                self.logits.append(logits)
        self.ids = torch.cat([self.ids, token], dim=-1)
        self.stats.tokens += 1
        chosen, put = token[0].cpu(), getattr(self.owner.streamer, "put", None)
        try:
            if put is not None:
                put(chosen)
        finally:
            # Not before: a caller who has not seen the new token goes on from the one before, which
            # then has no row.
            self.kept.keep(self.ids.shape[1] - 1)
        return (
            bool(self.criteria(self.ids, tuple(self.scores) or None).all())
            if self.criteria is not None
            else False
        )

    def _learn(
        self, tree: TokenTree, verified: Verified, verify_us: float, path: Sequence[int]
    ) -> None:
        if self.verifier.gate is not None and len(tree) > 1:
            self.verifier.gate.learn(path)
        reads = self.owner.reads
        if reads is not None:
            reads.learn(tree, verified, verify_us)
        self.owner.latency.observe(
            self.verifier.mean_rows(verified, len(tree)), tree.leaves, verify_us
        )

    def _advance(self, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        self.tree.advance(accepted, int(self.ids[0, -1]))
        if self.owner.draft is not None:
            self.owner.draft.advance(accepted, tokens, self.tree)

    def _counts(self) -> tuple[float, float, int]:
        """(bytes read, microseconds waited for reads, nodes drafted ahead) so far."""
        target, ahead = self.owner.target, self.owner.ahead
        nodes = 0 if ahead is None else ahead.nodes
        if target is None:
            return 0, 0, nodes
        waited = target.stream.wait_us + (
            target.experts.counters.wait_us if target.experts is not None else 0
        )
        return target.pack.reader.counters.nbytes, waited, nodes

    def _output(self) -> Any:
        if not self.config.return_dict_in_generate:
            return self.ids
        from transformers.generation import GenerateDecoderOnlyOutput

        output = GenerateDecoderOnlyOutput(
            sequences=self.ids, scores=tuple(self.scores) or None, logits=tuple(self.logits) or None
        )
        output[self.verifier.cache_name] = self.cache
        return output


def _likeliest_path(tree: TokenTree, verified: Verified, row: int) -> list[int]:
    """The row and those below it that the target most likely takes, as far as they were
    not pruned.
    """
    path = [row]
    while len(path) < AT_ONCE:
        below = [child for child in tree.children[path[-1]].values() if child in verified.row_of]
        if not below:
            break
        path.append(max(below, key=lambda child: tree.reach[child]))
    return path


def _cache(model: Any, kwargs: dict[str, Any]) -> Any:
    from transformers import DynamicCache

    found = cache_in(kwargs)
    if found is None:
        return DynamicCache(config=model.config)
    if not isinstance(found, DynamicCache):
        raise SpeculationError(f"speculation needs a DynamicCache, found {type(found).__name__}")
    return found
