"""What a layer costs on the CPU and on an accelerator, measured before layers are placed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.device.streams import LINK
from lever_ext.flash.format import Block
from lever_ext.flash.pack import FlashPack, Tensors, tensors_in, views
from lever_ext.flash.reader import Buffer
from lever_ext.operators.decoder import FlashDecoderLayer, as_parameters
from lever_ext.operators.experts import FlashExperts
from lever_ext.operators.transfer import CPU
from lever_ext.placement.device import TargetDevice
from lever_ext.placement.split import LayerCosts

TREE_SIZE = 32
"""Nodes of the tree that costs are measured with. On the CPU a pass hardly depends on the number,
on an accelerator even less.
"""
REPEATS = 5
"""The median counts, after one call that warms up."""
READS = 3
"""The same for reads from flash."""


@dataclass(frozen=True)
class Measured:
    """Microseconds of a target's parts."""

    layers: tuple[LayerCosts, ...]
    """As if all were streamed; those of one shape are measured once."""
    hop_us: float
    """Hidden states of a tree over the link, one way."""
    expert_cpu_us: float = 0.0
    """A routed expert that is in DRAM, for one token."""
    expert_device_us: float = 0.0
    """The same with its way to the accelerator."""
    head_cpu_us: float = 0.0
    """Output projection of one token."""
    head_device_us: float = 0.0


class _Stopped(Exception):
    """Ends a forward pass where the first layer's inputs are known."""


class Stopwatch:
    """Times calls to the end of what they started on the accelerator."""

    def __init__(self, accelerator: TargetDevice) -> None:
        self._streams = accelerator.streams

    def us(self, call: Callable[[], object], repeats: int = REPEATS) -> float:
        """Median microseconds of a call."""
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
    model: Any,
    pack: FlashPack,
    operators: Sequence[FlashDecoderLayer],
    accelerator: TargetDevice,
) -> Measured:
    """Measure one layer of each shape, an expert, the head and the link.

    Args:
        model: its resident parts are loaded.
        pack: of its weights.
        operators: the decoder layers; not bound to a stream yet.
        accelerator: what the CPU is compared with.

    Raises:
        FlashError: a layer cannot be read.
    """
    watch = Stopwatch(accelerator)
    hidden, kwargs = first_inputs(model, operators[0])
    known: dict[Any, LayerCosts] = {}
    layers = []
    for block, operator in zip(pack.blocks("layer"), operators, strict=True):
        shape = _shape(block)
        if shape not in known:
            known[shape] = _layer(pack, block, operator, hidden, kwargs, accelerator, watch)
        layers.append(known[shape])
    expert_cpu_us, expert_device_us = _expert(pack, operators, hidden, accelerator, watch)
    head_cpu_us, head_device_us = _head(model, hidden, accelerator, watch)
    return Measured(
        layers=tuple(layers),
        hop_us=_hop(hidden, accelerator, watch),
        expert_cpu_us=expert_cpu_us,
        expert_device_us=expert_device_us,
        head_cpu_us=head_cpu_us,
        head_device_us=head_device_us,
    )


def first_inputs(model: Any, first: nn.Module) -> tuple[torch.Tensor, dict[str, Any]]:
    """(hidden states [1, N, H], keyword arguments) of the first layer in a pass.

    N is `TREE_SIZE`.
    """
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.append((hidden, kwargs))
        raise _Stopped

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    tokens = torch.arange(TREE_SIZE)[None] % model.config.vocab_size
    try:
        with torch.no_grad():
            model.base_model(tokens, use_cache=False)
    except _Stopped:
        pass
    finally:
        hook.remove()
    return seen[0]


def _shape(block: Block) -> tuple[Any, ...]:
    """What a layer's costs depend on: its tensors without the number of the layer."""
    found = []
    for tensor in block.tensors:
        inner_name = tensor.name.split(".", 3)[3]
        found.append((inner_name, tensor.dtype, tensor.shape))
    return tuple(found)


def _hop(hidden: torch.Tensor, accelerator: TargetDevice, watch: Stopwatch) -> float:
    """Hidden states over the link: the mean of both ways."""
    there = hidden.to(accelerator.device, copy=True)
    to_device = watch.us(lambda: hidden.to(accelerator.device, copy=True))
    to_cpu = watch.us(lambda: there.to(CPU, copy=True))
    return (to_device + to_cpu) / 2


def _layer(
    pack: FlashPack,
    block: Block,
    operator: FlashDecoderLayer,
    hidden: torch.Tensor,
    kwargs: Mapping[str, Any],
    accelerator: TargetDevice,
    watch: Stopwatch,
) -> LayerCosts:
    """Read, copy and compute a layer without its routed experts, which are a part of their own."""
    device = accelerator.device
    buffer = Buffer(block.nbytes)
    memory = torch.empty(block.nbytes, dtype=torch.uint8, device=device)
    if accelerator.pins is not None:
        accelerator.pins.add([buffer])

    def send() -> None:
        memory.copy_(buffer.bytes[: block.nbytes], non_blocking=True)

    def compute_on_cpu() -> None:
        run(operator, tensors_in(block, buffer), hidden, kwargs)

    def compute_on_device() -> None:
        run(operator, views(block, memory), hidden.to(device), there)

    try:
        read_us = watch.us(lambda: pack.submit(block, buffer).result(), READS)
        pack.check(block, buffer)
        copy_us = watch.us(lambda: accelerator.streams.enqueue(LINK, send))
        there = moved(kwargs, device)
        with without_experts(operator):
            cpu_us = watch.us(compute_on_cpu)
            device_us = watch.us(compute_on_device)
    finally:
        if accelerator.pins is not None:
            accelerator.pins.release()
    return LayerCosts(read_us, copy_us, cpu_us, device_us)


def run(
    operator: FlashDecoderLayer,
    tensors: Tensors,
    hidden: torch.Tensor,
    kwargs: Mapping[str, Any],
) -> None:
    """Compute a layer with weights that are not its stream's; afterwards it has its former ones."""
    former = {}
    for name, (module, leaf) in operator.sites.items():
        value = getattr(module, leaf)
        if value is not None:
            former[name] = value
    operator.set_parameters(as_parameters(tensors))
    try:
        with torch.no_grad():
            operator.layer(hidden, **kwargs)
    finally:
        operator.set_parameters(former)


@contextmanager
def without_experts(operator: FlashDecoderLayer) -> Iterator[None]:
    """Let a layer compute without its routed experts."""
    replaced: list[tuple[nn.Module, str, FlashExperts]] = []
    for module in operator.layer.modules():
        for name, child in module.named_children():
            if isinstance(child, FlashExperts):
                replaced.append((module, name, child))
    for module, name, _ in replaced:
        setattr(module, name, _NoExperts())
    try:
        yield
    finally:
        for module, name, experts in replaced:
            setattr(module, name, experts)


class _NoExperts(nn.Module):
    def forward(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)


def moved(kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments with their tensors on a device."""

    def on_device(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(part.to(device) for part in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: on_device(value) for name, value in kwargs.items()}


def _expert(
    pack: FlashPack,
    operators: Sequence[FlashDecoderLayer],
    hidden: torch.Tensor,
    accelerator: TargetDevice,
    watch: Stopwatch,
) -> tuple[float, float]:
    """A routed expert for one token: (on the CPU, on the accelerator with its copy)."""
    blocks = pack.blocks("expert")
    experts = _experts_of(operators, blocks[0].layer) if blocks else None
    if experts is None:
        return 0.0, 0.0
    device = accelerator.device
    tensors = pack.load(blocks[0])
    token = hidden[0, :1]
    there = token.to(device)

    def send_and_compute() -> None:
        sent = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        experts.compute(there, sent)

    cpu_us = watch.us(lambda: experts.compute(token, tensors))
    return cpu_us, watch.us(send_and_compute)


def _experts_of(operators: Sequence[FlashDecoderLayer], layer: int) -> FlashExperts | None:
    """The experts operator of a decoder layer; None where no operator replaces experts."""
    for operator in operators:
        for module in operator.modules():
            if isinstance(module, FlashExperts) and module.layer_index == layer:
                return module
    return None


def _head(
    model: Any,
    hidden: torch.Tensor,
    accelerator: TargetDevice,
    watch: Stopwatch,
) -> tuple[float, float]:
    """Output projection of one token: (on the CPU, on the accelerator and back)."""
    head = model.get_output_embeddings()
    token = hidden[0, :1]
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return 0.0, math.inf
    if head.weight.nbytes > accelerator.free_bytes:
        return 0.0, math.inf
    device = accelerator.device
    weight = head.weight.detach().to(device, copy=True)
    cpu_us = watch.us(lambda: head(token))
    device_us = watch.us(lambda: nn.functional.linear(token.to(device), weight).to(CPU))
    return cpu_us, device_us
