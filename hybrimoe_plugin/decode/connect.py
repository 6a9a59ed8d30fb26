"""Choosing how a bound model's decoder layers are called: CPU graphs, CUDA graphs or eagerly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.rope import Rope
from hybrimoe_plugin.decode.cpu_layer import CpuLayer
from hybrimoe_plugin.decode.cpu_step import cpu_step
from hybrimoe_plugin.decode.cuda_layer import cuda_layer
from hybrimoe_plugin.decode.decode_state import DecodeState
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.last_tokens import LastTokens
from hybrimoe_plugin.decode.rope_matrix import RopeMatrix
from hybrimoe_plugin.device.cuda_graphs import capture_for
from hybrimoe_plugin.engine.turns import Turns


def connect_layers(model: Any, turns: Turns) -> Callable[[], None]:
    """Let the graphed layers of a bound model use graphs, where settings and device allow it.

    Args:
        turns: of the model; what an interrupted turn leaves is cleared before the next one.

    Returns:
        Takes off what this leaves on the model.

    Mutates: `model`, `turns`.
    """
    last_tokens: LastTokens | None = None
    ropes: dict[Rope, RopeMatrix] = {}
    states: dict[torch.device, DecodeState | None] = {}
    for layer in model.modules():
        if not isinstance(layer, GraphedLayer):
            continue
        on_cpu = _cpu_layer(layer, ropes)
        if on_cpu is None:
            _use_cuda_graphs(layer, states)
            continue
        layer.layer_call = on_cpu
        if layer.self_attn.layer_idx == model.config.num_hidden_layers - 1:
            on_cpu.last_tokens = last_tokens = LastTokens(model, layer)
            turns.clean_up.append(_weakly(last_tokens.forget))
    return (lambda: None) if last_tokens is None else last_tokens.remove


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Call a method as long as its object lives.

    The engine's threads end with the model, so nothing that outlives it, as turns do, may hold it.
    """
    found = weakref.WeakMethod(method)

    def call() -> None:
        alive = found()
        if alive is not None:
            alive()

    return call


def _cpu_layer(layer: GraphedLayer, ropes: dict[Rope, RopeMatrix]) -> CpuLayer | None:
    if layer.settings.graphs == "off":
        return None
    step = cpu_step(layer.eager.module, layer.form, ropes)
    return None if step is None else CpuLayer(layer.eager, step)


def _use_cuda_graphs(layer: GraphedLayer, states: dict[torch.device, DecodeState | None]) -> None:
    """Mutates: `layer`; `states`, one for each device, None where nothing can be captured."""
    if layer.settings.graphs == "off":
        return
    device = next(layer.parameters()).device
    if device not in states:
        capture = capture_for(device)
        states[device] = None if capture is None else DecodeState(capture, device)
    state = states[device]
    if state is None:
        return
    # The operator's own hooks: hooks are removed from this dict and added to it, and it stays.
    output_hooks = layer._forward_hooks
    on_cuda = cuda_layer(layer.key, layer.eager, output_hooks, state, layer.settings)
    if on_cuda is not None:
        layer.layer_call = on_cuda
