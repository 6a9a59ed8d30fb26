"""The lines before a conversation: the model, where its weights lie, threads, memory, context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_plugin.device.memory import free_host_bytes, human
from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.hosts.transformers.preparation.places import experts_operators
from hybrimoe_plugin.weights.gguf_store import GGUFStore


def banner(model: Any) -> list[str]:
    """Two to four lines about a model that `load_model` gave."""
    operators = experts_operators(model)
    store = operators[0].store if operators else None
    handle = getattr(model, "hybrimoe", None)
    engines = () if handle is None else handle.engines
    lines = [] if store is None else [_model(model, store)]
    lines += _weights(model, store, engines)
    lines.append(machine(model, [engine.cpu for engine in engines]))
    return lines


def machine(model: Any, backends: Sequence[Any] = ()) -> str:
    """The line about threads, free memory and the context.

    Args:
        backends: that compute experts on the CPU.
    """
    names = sorted({str(backend.name) for backend in backends})
    threads = max([torch.get_num_threads(), *(getattr(part, "threads", 1) for part in backends)])
    kernels = f" ({', '.join(names)})" if names else ""
    context = getattr(model.config, "max_position_embeddings", None)
    room = "" if context is None else f"; context {context} tokens"
    return f"CPU: {threads} thread(s){kernels}; memory free: {human(free_host_bytes())}{room}"


def _model(model: Any, store: GGUFStore) -> str:
    name = store.metadata.get("general.name")
    label = name[:60] if isinstance(name, str) and name.isprintable() else "model"
    more = len(store.paths) - 1
    files = f"{store.paths[0].name}{f' and {more} more' if more else ''}"
    return f"{label} ({model.config.model_type}), {files}"


def _weights(model: Any, store: GGUFStore | None, engines: Sequence[Engine]) -> list[str]:
    parts = []
    if store is not None:
        place = "in memory" if store.in_memory else "mapped from disk"
        parts.append(f"{human(store.nbytes)} {place}")
    dense = _tensor_bytes(model, "cpu")
    if dense:
        parts.append(f"{human(dense)} dequantised in memory")
    on_device = _tensor_bytes(model, "cuda")
    if on_device:
        parts.append(f"{human(on_device)} dense on the GPU")
    parts += [_slots(engine) for engine in engines if engine.accelerator is not None]
    return [f"weights: {', '.join(parts)}"] if parts else []


def _slots(engine: Engine) -> str:
    """The experts that an accelerator caches."""
    slots = engine.accelerator.slots if engine.accelerator is not None else 0
    experts = sum(weights.spec.experts for weights in engine.layers)
    size = max(weights.spec.expert_bytes for weights in engine.layers)
    place = "an emulated GPU" if engine.clock.emulated else "the GPU"
    return f"{human(slots * size)} for {slots} of {experts} experts on {place}"


def _tensor_bytes(model: Any, kind: str) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(part.numel() * part.element_size() for part in tensors if part.device.type == kind)
