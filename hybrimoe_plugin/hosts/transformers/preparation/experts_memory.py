"""What an engine's experts will take: the file's bytes, slots on an accelerator, and copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hybrimoe_plugin.compute.cpu.ggml_stored import is_apart
from hybrimoe_plugin.compute.cpu.repack import SLOW_TYPES, repacked_bytes
from hybrimoe_plugin.compute.cpu.requantise import Requantised
from hybrimoe_plugin.compute.gpu.kernels.layout import slot_layout
from hybrimoe_plugin.compute.gpu.repack_buffers import REPACK_BUFFERS
from hybrimoe_plugin.compute.gpu.slot_kernels import make_kernels, on_cpu
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.machine import device_refusal
from hybrimoe_plugin.engine.assemble import accelerator_kind
from hybrimoe_plugin.engine.cpu_choice import ON_GGML, cpu_backends, requantised_experts
from hybrimoe_plugin.engine.sizing import DEFAULT_EMULATED_RATIO, quotas_beside, staging_slots
from hybrimoe_plugin.hosts.transformers.preparation.places import experts_operators
from hybrimoe_plugin.hosts.transformers.preparation.prediction import (
    EMULATED,
    MAPPED,
    MEMORY,
    PINNED,
    Part,
)
from hybrimoe_plugin.operators.bind import by_engine
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import LayerWeights

EXPERTS = "experts, as stored"
APART = "experts that the file keeps apart, put together"
FASTER = "experts in a type with faster kernels"
STAYING = "experts that stay on the CPU, as stored"
REQUANTISED = "experts in a type with a kernel"


@dataclass(frozen=True)
class EnginePlace:
    """Where the experts of one engine will lie."""

    place: str
    """Of the file's bytes."""
    layers: tuple[int, ...]
    """Decoder layers, in order."""
    experts: int
    """Routed experts of a layer."""
    quotas: tuple[int, ...]
    """Cached experts of each layer at the start."""
    parts: tuple[Part, ...]
    requantised: tuple[Requantised, ...] = ()
    """Experts in types that the CPU's kernels lack; the copies are among the parts."""


def engine_places(
    model: nn.Module, store: GGUFStore, parts: Sequence[Part], free: Mapping[str, int]
) -> tuple[list[EnginePlace], tuple[str, ...]]:
    """The engines that `bind` would make, and notes on what is not known of them.

    Args:
        model: with its operators injected.
        parts: everything but the experts, which accelerators must hold beside the slots.
        free: free bytes of each accelerator.

    Raises:
        BudgetError: the slots do not fit.
        WeightsError, ConfigError: as `HybriMoEExperts.find_weights`.
    """
    found = []
    unknown: dict[str, Settings] = {}
    for members in by_engine(experts_operators(model)):
        first = members[0]
        kind, device = accelerator_kind(first.settings, first.devices)
        layers = [operator.find_weights() for operator in members]
        room = None
        if kind == "cuda":
            taken = sum(part.nbytes for part in parts if part.place == str(device))
            room = max(0, free.get(str(device), 0) - taken)
            if device_refusal(str(device)) is not None:
                room = None
                unknown[str(device)] = first.settings
        place = EMULATED if kind == "emulated" else str(device)
        refused: dict[int, str] = {}
        if kind != "none":
            kernels = make_kernels(first.settings.kernels, device, tuned=False)
            _, refused = on_cpu(*kernels, layers, str(device))
        quotas, slots = _slots(first.settings, layers, kind, place, room, refused)
        found.append(_engine(members, layers, kind, quotas, slots, refused))
    return found, tuple(_unknown_room(unknown))


def _unknown_room(devices: Mapping[str, Settings]) -> Iterator[str]:
    """Notes on devices that are not here, with the settings of their engines."""
    if not devices:
        return
    note = f"the memory of {' and '.join(devices)} is not known here"
    if any(item.cache_ratio is None and item.cache_bytes is None for item in devices.values()):
        note += (
            f": {DEFAULT_EMULATED_RATIO:.0%} of the experts are taken to be cached there; "
            "cache_ratio or cache_bytes sets it"
        )
    yield note


def _slots(
    settings: Settings,
    layers: Sequence[LayerWeights],
    kind: str,
    place: str,
    room: int | None,
    refused: Mapping[int, str],
) -> tuple[tuple[int, ...], list[Part]]:
    """(cached experts of each layer, what the slots take). Raises: BudgetError.

    Args:
        refused: layers that stay on the CPU.
    """
    if kind == "none":
        return (0,) * len(layers), []
    experts = layers[0].spec.experts
    sizes = [weights.spec.expert_bytes for weights in layers]
    quotas = quotas_beside(refused, settings, experts, sizes, room)
    cached = sum(quotas)
    staging = staging_slots(cached)
    held = [weights for layer, weights in enumerate(layers) if layer not in refused]
    layouts = [slot_layout(weights.spec, planar=kind == "cuda") for weights in held]
    slot_bytes = max(layout.size for layout in layouts)
    buffers = REPACK_BUFFERS * max(layout.largest_planar for layout in layouts)
    share = cached / (experts * len(layers))
    parts = [
        Part(place, f"{cached} cached experts ({share:.0%} of all)", cached * slot_bytes),
        Part(place, f"{staging} staging slots", staging * slot_bytes + buffers),
    ]
    return tuple(quotas), parts


def _engine(
    members: Sequence[HybriMoEExperts],
    layers: Sequence[LayerWeights],
    kind: str,
    quotas: tuple[int, ...],
    slots: Sequence[Part],
    refused: Mapping[int, str],
) -> EnginePlace:
    place = PINNED if kind == "cuda" else MAPPED
    settings = members[0].settings
    alone = kind == "none"
    backends = cpu_backends(settings, layers, alone)
    # Where one backend requantises, all that may be chosen do: see `cpu_backends`.
    requantised = requantised_experts(backends[0], layers)
    sizes = [weights.spec.experts * weights.spec.expert_bytes for weights in layers]
    unpinned = sum(sizes[layer] for layer in refused)
    stored = sum(sizes) - unpinned
    if alone:  # nothing reads their bytes in the file any more
        stored -= sum(item.stored_bytes for item in requantised)
    parts = [Part(place, EXPERTS, stored), Part(MAPPED, STAYING, unpinned), *slots]
    parts += _copies(settings, layers, alone, backends)
    if requantised:
        parts.append(Part(MEMORY, REQUANTISED, sum(item.nbytes for item in requantised)))
    numbers = tuple(operator.layer_index for operator in members)
    experts = layers[0].spec.experts
    return EnginePlace(place, numbers, experts, quotas, tuple(parts), tuple(requantised))


def _copies(
    settings: Settings, layers: Sequence[LayerWeights], alone: bool, backends: tuple[str, ...]
) -> list[Part]:
    """What the CPU's kernels copy of matrices that they could read, at most."""
    found = []
    in_place = ON_GGML.issuperset(backends)
    apart = sum(_apart_bytes(weights, in_place) for weights in layers)
    if apart and backends != ("torch",):
        found.append(Part(MEMORY, APART, apart))
    if in_place and alone and settings.weights != "mapped":
        faster = sum(_faster_bytes(weights) for weights in layers)
        if faster:
            found.append(Part(MEMORY, FASTER, faster, most=True))
    return found


def _apart_bytes(weights: LayerWeights, in_place: bool) -> int:
    """Bytes of experts that are put together, but for those that ggml reads where they lie."""
    found = 0
    for matrix in weights.matrices():
        even = matrix.stacked is not None or matrix.spread is not None
        if not even and not (in_place and is_apart(matrix)):
            found += sum(part.size for part in matrix.experts)
    return found


def _faster_bytes(weights: LayerWeights) -> int:
    """Bytes of the layer's matrices in Q8_0, where that may be faster."""
    spec = weights.spec
    shape = (spec.experts, spec.intermediate, spec.hidden)
    slow = [matrix for matrix in weights.matrices() if matrix.type_name in SLOW_TYPES]
    return len(slow) * repacked_bytes(shape)
