"""The ways in which a decode step can run, next to each other: which there are, what is watched."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from eval.host_path.stopwatch import Method
from eval.host_path.subject import Subject
from hybrimoe_plugin.config import Settings

WAIT = "wait"
"""The host reads each layer's routing before it goes on: the twin."""
CHAIN = "chain"
"""All layers are launched ahead, and the host deals with misses only."""
SETTING = "host_path"


def paths() -> tuple[str, ...]:
    """The paths that this version has, the twin first."""
    chosen = any(item.name == SETTING for item in fields(Settings))
    return (WAIT, CHAIN) if chosen else (WAIT,)


def settings(path: str) -> dict[str, Any]:
    """What selects a path."""
    return {SETTING: path} if len(paths()) > 1 else {}


def where_routing_is_known(subject: Subject) -> list[Method]:
    """The methods that return when the host knows a layer's routing."""
    return [(subject.engine, "_read")]


def watched(subject: Subject) -> dict[str, list[Method]]:
    """Part, as the table names it -> its methods."""
    engine: Any = subject.engine
    found = {
        "engine, all of it": (engine, "run"),
        "read the routing": (engine, "_read"),
        "learn": (engine, "_learn"),
        "plan": (engine.controller, "begin"),
        "CPU task": (subject.cpu, "submit"),
        "launches, demand loads": (engine._waves, "compute"),
        "onloads of all kinds": (engine._waves, "onload"),
        "look ahead": (engine, "_look_ahead"),
        "finish": (engine.controller, "finish"),
    }
    return {name: [method] for name, method in found.items() if hasattr(*method)}
