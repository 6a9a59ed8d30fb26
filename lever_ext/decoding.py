"""Speculative decoding as a custom decoding method of `generate`.

    decoder = LeverDecoding(draft, make_policy("lever"), target)
    model.generate(**inputs, custom_generate=decoder, max_new_tokens=100)

Sample-then-match (paper 2c): the target's own token is sampled at the root with `generate`'s own
processors, then at the child that equals it, and so on until no child does. The output's
distribution is the target's for every tree and pruning; greedy decoding is the special case. One
random number is drawn per token, as plain `generate` does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from hybrimoe_plugin.errors import SpeculationError
from lever_ext.drafts.base import Draft
from lever_ext.drafts.language_model import LanguageModelDraft, vocabulary_of
from lever_ext.speculation.answer import Answer
from lever_ext.speculation.draft_ahead import OverlappedDrafting
from lever_ext.speculation.expert_reads import ExpertReads
from lever_ext.speculation.routing_forecast import RoutingForecast
from lever_ext.speculation.run import Parts, SpeculativeRun
from lever_ext.speculation.stats import SpeculationStats
from lever_ext.speculation.verify import NO_TREES, takes_trees
from lever_ext.target import FlashTarget
from lever_ext.tree.calibrate import Calibration
from lever_ext.tree.cost import CycleCost
from lever_ext.tree.latency import LatencyTable
from lever_ext.tree.policies import TreePolicy, make_policy

log = logging.getLogger(__name__)


class LeverDecoding:
    """Callable for `generate(custom_generate=...)`.

    It keeps what it learned about costs and the draft between calls.

    Threads may share it; their answers are then made one after the other: a draft keeps the KV
    entries of one sequence, and would have to read the other's text anew at every change. Decoders
    with drafts of their own on one target interleave cycle by cycle, among each other and with
    plain `generate`.

    Args:
        draft: proposes tokens; None only with a policy that drafts nothing.
        policy: builds the trees.
        target: where the model's weights live on flash: its reads are counted, its early exit used.
            None for a model in memory.
        max_nodes: nodes that a tree may have; a safety limit, not a budget.
        streamer: gets every token. `generate` does not hand its own to custom decoding methods.
        overlap: draft for the next cycle while a pass waits for flash, read experts while the draft
            works; False is the plain twin.
        price_union: count the experts that a node adds in a tree's cost; False is the plain twin.
        prune: where the target has an early exit: `auto` uses it for passes where that is predicted
            to be worthwhile, `always`.

    Raises:
        SpeculationError: a policy that drafts, without a draft.
    """

    def __init__(
        self,
        draft: Draft | None,
        policy: TreePolicy,
        target: FlashTarget | None = None,
        max_nodes: int = 128,
        streamer: Any = None,
        overlap: bool = True,
        price_union: bool = True,
        prune: str = "auto",
    ) -> None:
        if target is not None and policy.name != "none" and not takes_trees(target.model):
            log.warning("%s; its answers are decoded token by token", NO_TREES)
            draft, policy = None, make_policy("none")
        if draft is None and policy.name != "none":
            raise SpeculationError(f"tree {policy.name} needs a draft")
        self.draft = draft
        self.policy = policy
        self.target = target
        self.max_nodes = max_nodes
        self.streamer = streamer
        self.overlap = overlap
        self.prune = prune
        self.calibration = Calibration()
        self.latency = LatencyTable()
        self.cost = CycleCost(self.latency)
        self.reads = ExpertReads.of(target) if price_union else None
        self.forecast: RoutingForecast | None = None
        if self.reads is not None and target is not None:
            self.cost = CycleCost(self.reads.verify, self.reads.union)
            self.forecast = RoutingForecast.of(target, draft)
        self.draft_ahead: OverlappedDrafting | None = None
        if overlap and draft is not None and policy.name != "none":
            self.draft_ahead = OverlappedDrafting(draft)
        self.stats = SpeculationStats()
        """Of the last answer that was begun."""
        self.step: Callable[[Callable[[], bool]], bool] = lambda call: call()
        """Runs the prompt's pass and then each cycle; through it several decodings can take turns
        on one thread.
        """
        self._answering = threading.RLock()

    def close(self) -> None:
        """End the thread that drafts ahead, if there is one, once no answer is being made."""
        with self._answering:
            if self.draft_ahead is not None:
                self.draft_ahead.close()

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode; called by `generate`.

        Returns:
            ids [1, S], or what `generate` returns with `return_dict_in_generate`.

        Raises:
            SpeculationError: more than one sequence, padding, beams, or a draft with another
                vocabulary.
            FlashError: the target's pack cannot be read.
        """
        _check(input_ids, generation_config, model_kwargs)
        with self._answering, nullcontext() if self.draft is None else self.draft.lock:
            if self.draft_ahead is not None:
                self.draft_ahead.settle()
            if isinstance(self.draft, LanguageModelDraft):
                self.draft.serve(vocabulary_of(model))
            stats = self._new_stats(input_ids)
            answer = Answer(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
                self.streamer,
                stats,
            )
            self.stats = stats
            return SpeculativeRun(self._parts(), model, answer, stats).result()

    def _new_stats(self, ids: torch.Tensor) -> SpeculationStats:
        throttle = None if self.target is None else self.target.pack.reader.throttle
        return SpeculationStats(
            draft="none" if self.draft is None else self.draft.name,
            tree=self.policy.name,
            prompt_tokens=ids.shape[1],
            label="measured" if throttle is None else throttle.label,
        )

    def _parts(self) -> Parts:
        return Parts(
            draft=self.draft,
            policy=self.policy,
            target=self.target,
            max_nodes=self.max_nodes,
            overlap=self.overlap,
            prune=self.prune,
            calibration=self.calibration,
            latency=self.latency,
            cost=self.cost,
            reads=self.reads,
            forecast=self.forecast,
            draft_ahead=self.draft_ahead,
            step=self.step,
        )


def _check(ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> None:
    """Raise SpeculationError for what speculation cannot decode."""
    if ids.shape[0] != 1 or config.num_beams > 1:
        raise SpeculationError(
            f"speculation decodes one sequence without beams, found {ids.shape[0]} sequences"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise SpeculationError("speculation takes prompts without padding")
    if config.use_cache is False:
        raise SpeculationError("speculation needs use_cache")
