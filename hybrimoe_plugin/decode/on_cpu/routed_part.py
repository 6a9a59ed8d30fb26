"""A layer's router and routed experts as operations of its graph."""

from __future__ import annotations

import ctypes
from time import perf_counter_ns
from typing import Any

import torch

from hybrimoe_plugin.compute.cpu.ggml import GraphTensor
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.rule import Rule
from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks, has_own_forward, hooks_on_all
from hybrimoe_plugin.decode.on_cpu.router_rule import correction_of, rule_of
from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.operators.experts import HybriMoEExperts


class RoutedPart:
    """Neither router nor experts are called as modules then, so nobody may watch these.

    Args:
        rule: the router's.
        top_k: K.
    """

    def __init__(self, router: Any, experts: HybriMoEExperts, rule: Rule, top_k: int) -> None:
        self._router = router
        self._experts = experts
        self._rule = rule
        self._top_k = top_k
        self._weight = router.weight
        self._address = self._weight.data_ptr()
        self._numbers = _numbers(router)
        self._hooks = ForeignHooks([router, *experts.modules()], [router])
        self._ids: torch.Tensor | None = None
        self._times: tuple[ctypes.c_int64, ctypes.c_int64] | None = None

    def applies(self) -> bool:
        """Whether the experts of the next call are the CPU's, unwatched."""
        weight = self._router.weight
        if weight is not self._weight or weight.data_ptr() != self._address:
            return False
        if not self._experts.unplanned or correction_of(self._router) is not self._rule.correction:
            return False
        if _numbers(self._router) != self._numbers:
            return False
        if not has_own_forward(self._router) or not has_own_forward(self._experts):
            return False
        return not self._hooks.present() and not hooks_on_all()

    def build(self, graph: NativeGraph, x: GraphTensor) -> GraphTensor:
        """The sum over the experts of x [1, H]."""
        engine, position = self._experts.place
        cpu = engine.cpu
        assert isinstance(cpu, GgmlExperts), "routed_part() has checked it"
        logits = graph.matmul(graph.wrap(self._weight.detach()), x)
        ids, weights = graph.choose(logits, self._top_k, self._rule)
        started = graph.note_time()
        output = cpu.layer(position).add_to(graph, x, ids, weights)
        self._times = started, graph.note_time()
        self._ids = ids.value
        return output

    def note(self) -> None:
        """Tell the engine of a call that has been computed."""
        assert self._ids is not None and self._times is not None
        engine, position = self._experts.place
        started, ended = (time.value for time in self._times)
        start_us = engine.clock.now_us() - (perf_counter_ns() - started) / 1e3
        engine.note_whole(position, self._ids[None], start_us, (ended - started) / 1e3)


def _numbers(router: Any) -> list[Any]:
    """What a router keeps beside tensors, such as its `top_k`."""
    kept = router.__dict__.items()
    return [value for name, value in kept if isinstance(value, int | float) and name != "training"]


def routed_part(router: Any, experts: HybriMoEExperts | None) -> RoutedPart | None:
    """The router and experts of a layer; None where a graph cannot compute both."""
    if experts is None:
        return None
    engine, position = experts.place
    if not _computes(engine, position):
        return None
    top_k = engine.layers[position].spec.top_k
    rule = rule_of(router, top_k)
    return None if rule is None else RoutedPart(router, experts, rule, top_k)


def _computes(engine: Engine, position: int) -> bool:
    """Whether the engine's CPU computes whole calls with graphs of SwiGLU experts."""
    cpu = engine.cpu
    if not engine.unplanned or not isinstance(cpu, GgmlExperts):
        return False
    return cpu.layer(position).stored.is_swiglu
