"""Which accelerators the experts of a plan ask for, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.engine.assemble import Devices, accelerator_kind
from hybrimoe_plugin.injection.match import Match
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.experts import HybriMoEExperts

_DEVICES = ("prefill_device", "generate_device")
_OF_ACCELERATORS = ("cache_ratio", "cache_bytes")


def computes_alone(plan: Sequence[Match]) -> bool:
    """Whether no experts of the plan use an accelerator."""
    return _kinds(plan) <= {"none"}


def as_if_there(plan: Sequence[Match]) -> list[Match]:
    """The plan as it would be on the machine that it asks for.

    Experts that name a GPU are refused where there is none, so that no other operator may take
    the CPU instead: `auto` means the GPU to all of them.
    """
    if cuda_refusal() is None or "cuda" not in _kinds(plan):
        return list(plan)
    return [_on_cuda(match) for match in plan]


def idle_cache(plan: Sequence[Match]) -> str | None:
    """Why the cache's size has no effect, if the command line or the API gave one in vain."""
    given = [
        name
        for name in _OF_ACCELERATORS
        if any(name in match.given and match.kwargs[name] is not None for match in plan)
    ]
    if not given or not computes_alone(plan):
        return None
    return (
        f"{given[0]} has no effect: there is no accelerator here; accelerator='emulated' tries it"
    )


def _kinds(plan: Sequence[Match]) -> set[str]:
    """Kinds of accelerators, with `none`, that the experts will have."""
    found = set()
    for match in plan:
        if match.operator_class is None or not issubclass(match.operator_class, HybriMoEExperts):
            continue
        settings = dict(match.kwargs)
        devices = Devices(*(settings.pop(name, "auto") for name in _DEVICES))
        kind, _ = accelerator_kind(Settings.of(settings), devices)
        found.add(kind)
    return found


def _on_cuda(match: Match) -> Match:
    """The match with CUDA in place of devices that are left open."""
    operator = match.operator_class
    if operator is None or not issubclass(operator, DenseOperator | HybriMoEExperts):
        return match
    if any(match.kwargs.get(name, "auto") != "auto" for name in _DEVICES):
        return match
    return replace(match, kwargs={**match.kwargs, **dict.fromkeys(_DEVICES, "cuda")})
