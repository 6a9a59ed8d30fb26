"""Decodings side by side that take turns after every cycle.

A disk whose speed drifts is as slow for one as for the other. Every decoding has a thread of its
own for what `generate` does, but all cycles run on the caller's: with a pool of workers for each
thread OpenMP would put workers to sleep after every operation. Each has its own draft state and,
where the target has routed experts, its own expert cache of the same size: what the others do does
not help or hurt it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.base import Draft
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.operators.experts import FlashExperts
from lever_ext.target import FlashTarget, expert_cache


class Turns:
    """Runs what several threads ask for on one thread, in rotation."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Callable[[], bool], Future[bool]]] = {}
        self._ended: set[int] = set()
        self._changed = threading.Condition()

    def run(self, mine: int, call: Callable[[], bool]) -> bool:
        """From another thread: run `call` at my next turn, and wait for its result or error."""
        result: Future[bool] = Future()
        with self._changed:
            self._asked[mine] = (call, result)
            self._changed.notify_all()
        return result.result()

    def leave(self, mine: int) -> None:
        """Take no more turns."""
        with self._changed:
            self._ended.add(mine)
            self._changed.notify_all()

    def serve(self, order: Sequence[int]) -> None:
        """Run turns on this thread until all have left."""
        waiting = deque(order)
        while waiting:
            mine = waiting.popleft()
            with self._changed:
                self._changed.wait_for(lambda: mine in self._asked or mine in self._ended)  # noqa: B023
                asked = self._asked.pop(mine, None)
            if asked is None:
                continue
            call, result = asked
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)
            waiting.append(mine)


class Lane:
    """One decoding among others over the same model.

    Args:
        target: shared by all.
        make: the decoding of a target.
    """

    def __init__(self, target: FlashTarget, make: Callable[[FlashTarget], LeverDecoding]) -> None:
        experts = expert_cache(target.pack, target.residency, target.model.config)
        self.target = dataclasses.replace(target, experts=experts)
        self.decoder = make(self.target)

    def enter(self) -> None:
        """Let the model read through this lane's expert cache. Mutates: the model's operators."""
        for done in self.target.injection.replaced:
            if isinstance(done.operator, FlashExperts) and self.target.experts is not None:
                done.operator.serve_from(self.target.experts)


def run_together(
    lanes: Sequence[Lane], order: Sequence[int], tokens: Sequence[int], inputs: Any
) -> None:
    """Generate greedily on every lane, a cycle at a time in rotation; first the prompts.

    Args:
        order: of the lanes' turns.
        tokens: of each lane.

    Raises: what a decoding raised, once all have ended.
    """
    turns = Turns()

    def run(mine: int) -> None:
        lane = lanes[mine]

        def step(call: Callable[[], bool]) -> bool:
            def enter_and_call() -> bool:
                lane.enter()
                return call()

            return turns.run(mine, enter_and_call)

        try:
            lane.decoder.step = step
            lane.target.model.generate(
                **inputs,
                custom_generate=lane.decoder,
                max_new_tokens=tokens[mine],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        finally:
            turns.leave(mine)

    with ThreadPoolExecutor(len(lanes), "lane") as pool:
        runs = [pool.submit(run, mine) for mine in range(len(lanes))]
        with torch.no_grad():
            turns.serve(order)
        for ended in runs:
            ended.result()


def own_state(draft: Draft) -> Draft:
    """The same draft model with KV entries of its own."""
    return (
        LanguageModelDraft(draft.model, draft.name)
        if isinstance(draft, LanguageModelDraft)
        else NGramDraft()
    )
