"""The ways in which a decode step can run, next to each other: which there are, what is watched."""

from __future__ import annotations

from typing import Any

from eval.host_path.stopwatch import Method
from eval.host_path.subject import Subject

WAIT = "wait"
"""The host reads each layer's routing before it goes on: the twin."""
CHAIN = "chain"
"""Layers are launched ahead, and the host puts right what missed."""
PATHS = (WAIT, CHAIN)


def settings(path: str) -> dict[str, Any]:
    """What selects a path."""
    return {"host_path": "auto" if path == CHAIN else path}


def where_routing_is_known(subject: Subject) -> list[Method]:
    """The methods that return when the host knows a layer's routing."""
    links = _links(subject)
    if links:
        return [(link, "await_routing") for link in links]
    return [(subject.engine, "_read")]


def where_graphs_compute_misses(subject: Subject) -> list[Method]:
    """The methods that launch the experts in slots of a call with a miss, and say which."""
    return [(link, "compute_slots") for link in _links(subject)]


def watched(subject: Subject) -> dict[str, list[Method]]:
    """Part, as the table names it -> its methods."""
    engine: Any = subject.engine
    found = {
        "engine, all of it": (engine, "run"),
        "read the routing": (engine, "_read"),
        "plan": (engine.controller, "begin"),
        "CPU task": (subject.cpu, "submit"),
        "launches, demand loads": (engine._waves, "compute"),
        "onloads of all kinds": (engine._waves, "onload"),
        "learn": (engine.controller, "note"),
        "look ahead": (engine, "_look_ahead"),
        "finish": (engine.controller, "finish"),
    }
    methods = {name: [method] for name, method in found.items() if hasattr(*method)}
    links = _links(subject)
    if links:
        chain = subject.chain
        methods |= {
            "launch graphs": [(chain, "_launch")],
            "slot table, experts": [(link, "launch") for link in links],
            "learn routing, redo": [(chain, "_learn_next")],
            "bookkeeping of hits": [(engine, "note_hit")],
        }
    return methods


def _links(subject: Subject) -> list[Any]:
    """What the layers of a chain have; empty where there is none."""
    layers = range(len(subject.layers))
    found = [getattr(subject.graph_break(layer), "link", None) for layer in layers]
    return [link for link in found if link is not None]
