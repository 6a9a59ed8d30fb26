"""Choosing how a bound model's decoder layers are called: CPU graphs, CUDA graphs or eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.rope import Rope
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.decode.batch.connect import States, cuda_layer
from hybrimoe_plugin.decode.chain.connect import connect_chains, weakly
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.last_tokens import LastLayer, LastTokens, last_tokens_of
from hybrimoe_plugin.decode.on_cpu.connect_lazily import Linked, connect_lazily
from hybrimoe_plugin.decode.on_cpu.cpu_layer import CpuLayer
from hybrimoe_plugin.decode.on_cpu.cpu_step import cpu_step
from hybrimoe_plugin.decode.on_cpu.rope_matrix import RopeMatrix
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
    removes: list[Callable[[], None]] = []
    ropes: dict[Rope, RopeMatrix] = {}
    states: dict[torch.device, States | None] = {}
    chainable: list[GraphedLayer] = []
    links: list[Linked] = []
    kernels: Kernels | None = None
    for layer in model.modules():
        if not isinstance(layer, GraphedLayer):
            continue
        if layer.settings.graphs == "off":
            continue
        step = cpu_step(layer, ropes)
        if step is not None:
            layer.layer_call = CpuLayer(layer.eager, step)
            if step.link is not None:
                links.append((layer, step.link))
                kernels = kernels or step.kernels
        elif _use_cuda_graphs(layer, states):
            chainable.append(layer)
            continue
        elif _device(layer).type != "cpu":
            continue
        found = last_tokens_of(model, layer)
        if found is not None:
            last_tokens = found
            layer.layer_call = LastLayer(layer.layer_call, found)
            turns.clean_up.append(weakly(found.forget))
    if kernels is not None:
        removes.append(connect_lazily(model, kernels, links, turns))
    removes.append(connect_chains(model, chainable, turns))

    def remove() -> None:
        for part in removes:
            part()
        if last_tokens is not None:
            last_tokens.remove()

    return remove


def _device(layer: GraphedLayer) -> torch.device:
    return next(layer.parameters()).device


def _use_cuda_graphs(layer: GraphedLayer, states: dict[torch.device, States | None]) -> bool:
    """Whether the layer's steps are captured from now on.

    Mutates: `layer`; `states`, one for each device, None where nothing can be captured.
    """
    device = _device(layer)
    if device not in states:
        capture = capture_for(device)
        states[device] = None if capture is None else States(capture, device)
    found = states[device]
    if found is None:
        return False
    # The operator's own hooks: hooks are removed from this dict and added to it, and it stays.
    output_hooks = layer._forward_hooks
    on_cuda = cuda_layer(layer.key, layer.eager, output_hooks, found, layer.settings)
    if on_cuda is not None:
        layer.layer_call = on_cuda
    return on_cuda is not None
