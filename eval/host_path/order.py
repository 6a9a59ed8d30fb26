"""Tokens on a device that is always late, in which the order of all uses of slots is checked."""

from __future__ import annotations

import functools
from typing import Any

from eval.host_path import paths
from eval.host_path.edges import Edges
from eval.host_path.measure import Runner, whole_calls
from eval.host_path.reads import Reads
from eval.host_path.routing import CASES
from eval.host_path.subject import Subject, subject

LAYERS, EXPERTS = 4, 32
TOKENS = 4
"""Of each case, one case after the other, twice: with events that are reached, and late ones."""


def checked(path: str, tokens: int = TOKENS) -> int:
    """Pairs of uses whose order events guarantee, with events reached and late.

    Args:
        tokens: of each case. What the plans do depends a little on measured times, so a rare kind
            of use may need more of them to occur.

    Raises:
        RuntimeError: two uses of the same memory may come at the same time.
    """
    chosen = paths.settings(path)
    with subject(LAYERS, EXPERTS, addresses=True, down="Q6_K", **chosen) as made:
        edges = made.driver.edges = Edges()
        try:
            runner = Runner(made)
            _watch_captured(made)
            for reached in (True, False):
                made.driver.reached = reached
                for case in CASES:
                    with Reads(made.driver):
                        whole_calls(runner, case, tokens)
        finally:
            made.driver.edges = None
        return edges.checked


def _watch_captured(made: Subject) -> None:
    """Let graphs that find their slots on the device tell which ones they read."""
    for layer in range(len(made.layers)):
        resident: Any = getattr(made.graph_break(layer), "resident", None)
        if resident is not None:
            resident.__self__.on_replay = functools.partial(_read_slots, made, layer)


def _read_slots(made: Subject, layer: int) -> None:
    """As the graph does: of the experts that the device's table has."""
    graph_break: Any = made.graph_break(layer)
    accelerator: Any = made.engine.accelerator
    _, ids, *_ = graph_break.on_host
    chosen = ids.tolist()[0]
    present = graph_break.link.table.present[layer]
    cached = made.engine.controller.pool.cached[layer]
    layout = accelerator._layouts[id(made.engine.layers[layer])]
    slots = [cached[expert] for expert in chosen if expert in present]
    made.kernels.read_all(accelerator.memory, layout, slots)
