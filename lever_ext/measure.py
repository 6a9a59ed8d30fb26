"""What a layer costs on the CPU and on an accelerator, measured before a target's layers are
placed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.device.streams import LINK
from lever_ext.flash.accelerator import Accelerator
from lever_ext.flash.format import Block
from lever_ext.flash.pack import FlashPack, Tensors, tensors_in, views
from lever_ext.flash.reader import Buffer
from lever_ext.flash.split import LayerCosts
from lever_ext.operators.carry import CPU
from lever_ext.operators.decoder import FlashDecoderLayer
from lever_ext.operators.experts import FlashExperts

ROWS = 32
"""Rows of the tree that costs are measured with; on the CPU a pass hardly depends on them, on an
accelerator less.
"""
REPEATS = 5
"""The median counts, after one call that warms up."""


@dataclass(frozen=True)
class Measured:
    """Microseconds of a target's parts."""

    layers: tuple[LayerCosts, ...]
    """As if all were streamed; those of one shape are measured once."""
    hop_us: float
    """Hidden states of a tree over the link, one way."""
    expert_cpu_us: float = 0.0
    """A routed expert that is in DRAM, for a row."""
    expert_device_us: float = 0.0
    """The same with its way to the accelerator."""
    head_cpu_us: float = 0.0
    """Output projection of one row."""
    head_device_us: float = 0.0


class _Stopped(Exception):
    """Ends a forward pass where the first layer's inputs are known."""


class Stopwatch:
    """Times calls to the end of what they started on the accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._streams = accelerator.streams

    def us(self, call: Callable[[], object], repeats: int = REPEATS) -> float:
        call()
        self._streams.synchronize()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            self._streams.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)


def measure(
    model: Any, pack: FlashPack, operators: list[FlashDecoderLayer], accelerator: Accelerator
) -> Measured:
    """Measure one layer of each shape, an expert, the head and the link.

    Args:
        model: its resident parts are loaded.
        operators: the decoder layers; not bound to a stream yet.

    Raises:
        FlashError: a layer cannot be read.
    """
    watch = Stopwatch(accelerator)
    hidden, kwargs = first_inputs(model, operators[0])
    known: dict[Any, LayerCosts] = {}
    layers = []
    for block, operator in zip(pack.blocks("layer"), operators, strict=True):
        shape = tuple(
            (tensor.name.split(".", 3)[3], tensor.dtype, tensor.shape) for tensor in block.tensors
        )
        if shape not in known:
            known[shape] = _layer(pack, block, operator, hidden, kwargs, accelerator, watch)
        layers.append(known[shape])
    there = hidden.to(accelerator.device, copy=True)
    hop = watch.us(lambda: hidden.to(accelerator.device, copy=True)) + watch.us(
        lambda: there.to(CPU, copy=True)
    )
    return Measured(tuple(layers), hop / 2, *_expert(pack, operators, hidden, accelerator, watch),
                    *_head(model, hidden, accelerator, watch))  # fmt: skip


def first_inputs(model: Any, first: nn.Module) -> tuple[torch.Tensor, dict[str, Any]]:
    """(hidden states [1, ROWS, H], keyword arguments) that a pass over `ROWS` tokens gives its
    first layer.
    """
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise _Stopped

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model.base_model(torch.arange(ROWS)[None] % model.config.vocab_size, use_cache=False)
    except _Stopped:
        pass
    finally:
        hook.remove()
    return seen[0]


def _layer(
    pack: FlashPack,
    block: Block,
    operator: FlashDecoderLayer,
    hidden: torch.Tensor,
    kwargs: Mapping[str, Any],
    accelerator: Accelerator,
    watch: Stopwatch,
) -> LayerCosts:
    buffer = Buffer(block.nbytes)
    memory = torch.empty(block.nbytes, dtype=torch.uint8, device=accelerator.device)
    if accelerator.pins is not None:
        accelerator.pins.add([buffer])
    try:
        read = watch.us(lambda: pack.submit(block, buffer).result(), 3)
        pack.check(block, buffer)

        def send() -> None:
            memory.copy_(buffer.bytes[: block.nbytes], non_blocking=True)

        copy = watch.us(lambda: accelerator.streams.enqueue(LINK, send))
        there = moved(kwargs, accelerator.device)
        with without_experts(operator):
            cpu = watch.us(lambda: run(operator, tensors_in(block, buffer), hidden, kwargs))
            device = watch.us(
                lambda: run(operator, views(block, memory), hidden.to(accelerator.device), there)
            )
    finally:
        if accelerator.pins is not None:
            accelerator.pins.release()
    return LayerCosts(read, copy, cpu, device)


def run(
    operator: FlashDecoderLayer, tensors: Tensors, hidden: torch.Tensor, kwargs: Mapping[str, Any]
) -> None:
    """Compute a layer with weights that are not its stream's; afterwards it has its former ones."""
    before = {name: module._parameters[leaf] for name, (module, leaf) in operator.sites.items()}
    operator.set_parameters(
        {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    )
    try:
        with torch.no_grad():
            operator.layer(hidden, **kwargs)
    finally:
        operator.set_parameters(
            {name: parameter for name, parameter in before.items() if parameter is not None}
        )


@contextmanager
def without_experts(operator: FlashDecoderLayer) -> Iterator[None]:
    """Let a layer compute without its routed experts: they are a part of their own."""
    places = [
        (module, name)
        for module in operator.layer.modules()
        for name, child in module.named_children()
        if isinstance(child, FlashExperts)
    ]
    former = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, _Nothing())
    try:
        yield
    finally:
        for (module, name), experts in zip(places, former, strict=True):
            setattr(module, name, experts)


class _Nothing(nn.Module):
    def forward(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)


def moved(kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments with their tensors on a device."""
    return {
        name: tuple(part.to(device) for part in value)
        if isinstance(value, tuple)
        else value.to(device)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in kwargs.items()
    }


def _expert(
    pack: FlashPack,
    operators: list[FlashDecoderLayer],
    hidden: torch.Tensor,
    accelerator: Accelerator,
    watch: Stopwatch,
) -> tuple[float, float]:
    """Of a routed expert with one of the tree's rows: (on the CPU, on the accelerator with its
    copy).
    """
    blocks = pack.blocks("expert")
    found = [
        module
        for operator in operators
        for module in operator.modules()
        if isinstance(module, FlashExperts)
    ]
    if not blocks or not found:
        return 0.0, 0.0
    tensors, experts = (
        pack.load(blocks[0]),
        next(one for one in found if one.layer_index == blocks[0].layer),
    )
    row = hidden[0, :1]
    there = row.to(accelerator.device)
    cpu = watch.us(lambda: experts.compute(row, tensors))
    device = watch.us(
        lambda: experts.compute(
            there, {n: t.to(accelerator.device, copy=True) for n, t in tensors.items()}
        )
    )
    return cpu, device


def _head(
    model: Any, hidden: torch.Tensor, accelerator: Accelerator, watch: Stopwatch
) -> tuple[float, float]:
    """Output projection of a row: (on the CPU, on the accelerator and back)."""
    head, row = model.get_output_embeddings(), hidden[0, :1]
    if (
        not isinstance(head, nn.Linear)
        or head.bias is not None
        or head.weight.nbytes > accelerator.free_bytes
    ):
        return 0.0, math.inf
    weight = head.weight.detach().to(accelerator.device, copy=True)
    cpu = watch.us(lambda: head(row))
    device = watch.us(lambda: nn.functional.linear(row.to(accelerator.device), weight).to(CPU))
    return cpu, device
