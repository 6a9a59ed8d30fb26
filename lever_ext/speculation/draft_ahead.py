"""Drafting for the next cycle while the target's layers stream (paper 2c).

While a pass waits for flash a core is idle. A thread goes on expanding the candidate tree, the
likeliest nodes first. Whatever token the target chooses in the end, what was drafted after it is
kept and costs the next cycle nothing; the rest is forgotten with the tree's other branches. Outputs
do not depend on it.

    main thread     draft | pass: wait - layer - wait - layer | accept | draft | pass ...
    draft thread            expand | expand | expand                     (less to do)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lever_ext.drafts.base import Draft
from lever_ext.tree.candidates import CandidateTree

STEP = 0.3
"""Weight of a new measurement in moving averages."""


@dataclass
class DraftAheadCounters:
    """Of one decoder, since it was made."""

    nodes: int = 0
    """Expanded ahead."""
    calls: int = 0
    us: float = 0.0


class DraftAhead:
    """Expands a candidate tree on a thread of its own, one pass at a time.

    Args:
        draft: used by nobody else between `begin` and `end`.
        width: nodes in a draft call.
        threads: of torch, for the draft.
        least_reach: nodes less likely than this are not worth a call.
    """

    def __init__(
        self,
        draft: Draft,
        width: int = 4,
        threads: int = 1,
        least_reach: float = 1e-3,
    ) -> None:
        self.counters = DraftAheadCounters()
        self._draft = draft
        self._width = width
        self._threads = threads
        self._least_reach = least_reach
        self._call_s = 0.0
        """Moving average of a draft call's time."""
        self._stop = threading.Event()
        self._begun = False
        self._running: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, tree: CandidateTree, depth_limit: int, expected_us: float) -> None:
        """Start; tree and draft belong to the thread until `end`.

        Args:
            tree: its root has been expanded.
            depth_limit: of nodes that may get children.
            expected_us: time that the pass will take; no call is begun that would not end within
                it.
        """
        assert not self._begun
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                max_workers=1,
                thread_name_prefix="draft-ahead",
                initializer=torch.set_num_threads,
                initargs=(self._threads,),
            )
        self._stop.clear()
        until = time.perf_counter() + expected_us / 1e6
        self._begun = True
        self._running = self._pool.submit(self._work, tree, depth_limit, until)

    def end(self) -> None:
        """Stop after the running call. Raises what the draft raised."""
        running = self._running
        self.settle()
        if running is not None:
            running.result()

    def settle(self) -> None:
        """Stop after the running call, also after an interrupt inside `begin`. Mutates."""
        if not self._begun:
            return
        self._stop.set()
        if self._pool is not None:
            # Runs behind everything that the thread was given.
            self._pool.submit(int).result()
        self._running, self._begun = None, False

    def close(self) -> None:
        """End the thread; `begin` starts a new one."""
        self.settle()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _work(self, tree: CandidateTree, depth_limit: int, until: float) -> None:
        while not self._stop.is_set() and time.perf_counter() + self._call_s < until:
            keys = tree.unexpanded(depth_limit, self._width)
            if not keys or tree.nodes[keys[0]].reach < self._least_reach:
                return
            begin = time.perf_counter()
            proposals = self._draft.expand(tree, keys)
            for key, candidates in zip(keys, proposals, strict=True):
                tree.add(key, candidates)
            spent_s = time.perf_counter() - begin
            self._call_s = _average(self._call_s, spent_s)
            self.counters.nodes += len(keys)
            self.counters.calls += 1
            self.counters.us += spent_s * 1e6


class OverlappedDrafting:
    """Decides where drafting ahead is worthwhile, and shares the cores between it and the pass.

    Args:
        draft: slower than a look-up table, or there is nothing to hide.
        least_wait: share of a pass that must be waiting for flash; else draft and pass would only
            compete for the cores.
        least_us: of one draft call.
    """

    def __init__(
        self,
        draft: Draft,
        least_wait: float = 0.75,
        least_us: float = 1000.0,
    ) -> None:
        self._ahead = DraftAhead(draft)
        self._least_wait = least_wait
        self._least_us = least_us
        self._wait = 0.0
        """Moving average of the share of a pass that waits for flash."""
        self._draft_us = 0.0
        """Of a draft call."""

    @property
    def nodes(self) -> int:
        """Drafted ahead since the start."""
        return self._ahead.counters.nodes

    def observe(self, verify_us: float, wait_us: float, draft_us: float) -> None:
        """Learn from a finished pass and the time of a draft call. Mutates."""
        self._wait = _average(self._wait, wait_us / verify_us)
        self._draft_us = draft_us

    @contextmanager
    def drafting(
        self,
        tree: CandidateTree,
        depth_limit: int,
        expected_us: float,
    ) -> Iterator[None]:
        """Draft while the block runs the pass, if that is worthwhile.

        Args:
            tree: its root has been expanded.
            depth_limit: of nodes that may get children.
            expected_us: time that the pass will take.

        Raises: what the draft raised.
        """
        if self._wait < self._least_wait or self._draft_us < self._least_us:
            yield
            return
        threads = torch.get_num_threads()
        # Even one thread computes a streamed layer faster than it is read.
        try:
            torch.set_num_threads(max(1, threads - 1))
            self._ahead.begin(tree, depth_limit, expected_us)
            yield
        finally:
            torch.set_num_threads(threads)
            self._ahead.end()

    def settle(self) -> None:
        """End what an interrupted answer has left running. Mutates."""
        self._ahead.settle()

    def close(self) -> None:
        self._ahead.close()


def _average(old: float, new: float) -> float:
    """The moving average after a measurement; the first one stands for itself."""
    return old + STEP * (new - old) if old else new
