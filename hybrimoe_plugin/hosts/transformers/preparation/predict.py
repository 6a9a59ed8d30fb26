"""Predict what an injected model will take, from the file's header and the rules alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.cpu.requantise import Requantised, by_type
from hybrimoe_plugin.device.machine import device_refusal
from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.registry import names_of
from hybrimoe_plugin.hosts.transformers.preparation.experts_memory import EnginePlace, engine_places
from hybrimoe_plugin.hosts.transformers.preparation.parameters import missing_parameters
from hybrimoe_plugin.hosts.transformers.preparation.places import (
    CPU,
    experts_operators,
    experts_places,
    layer_of_name,
    places_of,
    uses_cuda,
)
from hybrimoe_plugin.hosts.transformers.preparation.prediction import (
    MAPPED,
    MEMORY,
    PINNED,
    PLACES,
    LayerPlace,
    Part,
    Prediction,
    Unreplaced,
    with_disk,
)
from hybrimoe_plugin.hosts.transformers.preparation.prepare import Prepared
from hybrimoe_plugin.hosts.transformers.stored import reads_into_memory, stored_matrices
from hybrimoe_plugin.injection.explain import grouped
from hybrimoe_plugin.operators.bind import attention_bytes, shorter_context
from hybrimoe_plugin.weights.dequant import supported
from hybrimoe_plugin.weights.find_experts import AnySource, source_of
from hybrimoe_plugin.weights.gguf_names import EXPERTS
from hybrimoe_plugin.weights.gguf_store import GGUFStore

STORED = "attention and other dense parts, as stored"
COPIED = "matrices in another row order or type than the file's"
DEQUANTISED = "attention and other dense parts, dequantised"
LEFT = "experts that no rule replaces, dequantised"
WHOLE = "the whole file, read into memory"
REST = "the rest of the file, read into memory"


def predict(prepared: Prepared, placed: Mapping[str, str]) -> Prediction:
    """Where every part of a model will lie, and how large it is there.

    Loading is refused by these numbers, and `hybrimoe explain` prints them.

    Args:
        prepared: with its operators injected, and no weight read.
        placed: qualified module name -> device, from `Injection.devices`.

    Raises:
        WeightsError, ConfigError: a tensor is missing, does not have the config's shape, or is of a
            type that cannot be dequantised and has no kernel.
        BudgetError: the cache for experts does not fit.
    """
    assert prepared.store is not None
    model, store, config = prepared.model, prepared.store, prepared.config
    source = source_of(store, config, names_of(config.model_type))
    place = _host_is_memory(places_of(model, placed))
    dense = [*_dequantised(model, config, place), *_stored(model, source, place)]
    sizes: Counter[tuple[str, str]] = Counter()
    for part, _ in dense:
        sizes[part.place, part.what] += part.nbytes
    parts = [Part(where, what, nbytes) for (where, what), nbytes in sizes.items()]
    parts += _kv_cache(model, prepared)
    free = _free(model)
    engines, notes = engine_places(model, store, parts, free)
    requantised = [made for matrix in stored_matrices(model) for made in matrix.requantised(source)]
    for engine in engines:
        parts += engine.parts
        requantised += engine.requantised
    reads = reads_into_memory(prepared.plan, store)
    if reads:
        parts = [part for part in parts if part.place != MAPPED]
        # Pages for transfers are pinned where they lie.
        pinned = sum(part.nbytes for part in parts if part.place == PINNED)
        what = REST if pinned else WHOLE
        parts.append(Part(MEMORY, what, max(0, store.nbytes - pinned)))
    file = MEMORY if reads else MAPPED
    return Prediction(
        parts=tuple(with_disk(parts, free[MEMORY])),
        layers=_layers(config, dense, engines, file),
        context=_context(model),
        free=free,
        outside=_held(dense, None, file),
        missing=_missing(parts),
        unreplaced=_unreplaced(model, source),
        requantised=_readable(by_type(requantised), store),
        notes=notes,
    )


def _readable(found: tuple[Requantised, ...], store: GGUFStore) -> tuple[Requantised, ...]:
    """The same. Raises: WeightsError: naming a tensor of a type that nothing here reads."""
    for item in found:
        if item.type_name not in supported():
            raise WeightsError(
                f"{store.paths[0]}: {item.tensors[0]}: GGML type {item.type_name} cannot be "
                f"dequantised; possible are {', '.join(supported())}"
            )
    return found


def _host_is_memory(place: Any) -> Any:
    """The same function, with the host's memory in place of the CPU."""

    def found(name: str) -> str:
        device: str = place(name)
        return MEMORY if device == CPU else device

    return found


def _dequantised(model: Any, config: Any, place: Any) -> Iterator[tuple[Part, int | None]]:
    """(part, layer) of every parameter that is read and dequantised."""
    for name, value in missing_parameters(model, config).items():
        what = LEFT if _of_experts(name) else DEQUANTISED
        nbytes = value.numel() * value.element_size()
        yield Part(place(name), what, nbytes), layer_of_name(name)


def _stored(model: Any, source: AnySource, place: Any) -> Iterator[tuple[Part, int | None]]:
    """(part, layer) of every dense matrix that stays as the file has it."""
    for matrix in stored_matrices(model):
        size = matrix.size(source)
        layer = layer_of_name(matrix.parameter)
        if matrix.on_device:
            yield Part(place(matrix.parameter), STORED, size.in_file - size.replaced), layer
            yield Part(place(matrix.parameter), DEQUANTISED, size.copied), layer
            continue
        yield Part(MAPPED, STORED, size.in_file - size.replaced), layer
        yield Part(MEMORY, COPIED, size.copied), layer


def _kv_cache(model: Any, prepared: Prepared) -> list[Part]:
    """The KV cache of the context, on the devices of the layers."""
    context = _context(model)
    devices = list(experts_places(model).values()) or [CPU]
    usable = uses_cuda(model)
    places = [device if device != CPU and usable else MEMORY for device in devices]
    found = []
    for place, count in Counter(places).items():
        nbytes = attention_bytes(model, context, count / len(places))
        found.append(Part(place, f"KV cache of {context} tokens", nbytes, later=True))
    return found


def _context(model: nn.Module) -> int:
    """The longest context that any engine is to leave room for."""
    operators = experts_operators(model)
    asked = max((operator.settings.context for operator in operators), default=4096)
    return shorter_context(model, asked)


def _free(model: nn.Module) -> dict[str, int]:
    """Free bytes of the host, and of every accelerator that experts are to use."""
    free = {MEMORY: free_host_bytes()}
    for device in set(experts_places(model).values()) - {CPU}:
        if device_refusal(device) is None:
            free[device], _ = torch.cuda.mem_get_info(device)
    return free


def _missing(parts: Iterable[Part]) -> dict[str, str]:
    """Accelerator -> why it cannot be used here, of those that hold a part."""
    found = {}
    for place in dict.fromkeys(part.place for part in parts):
        refusal = None if place in PLACES else device_refusal(place)
        if refusal is not None:
            found[place] = refusal
    return found


def _layers(
    config: Any, dense: list[tuple[Part, int | None]], engines: list[EnginePlace], file: str
) -> tuple[LayerPlace, ...]:
    """Where each layer lies; `file` is the place of the file's own bytes."""
    left = {layer: part.place for part, layer in dense if part.what == LEFT}
    by_layer = {layer: (engine, at) for engine in engines for at, layer in enumerate(engine.layers)}
    found = []
    for layer in range(config.num_hidden_layers):
        held = _held(dense, layer, file)
        if layer in by_layer:
            engine, at = by_layer[layer]
            experts = file if engine.place == MAPPED else engine.place
            cached = engine.quotas[at]
            found.append(LayerPlace(layer, held, experts, engine.experts, cached, True))
        else:
            found.append(LayerPlace(layer, held, left.get(layer), 0, 0, False))
    return tuple(found)


def _held(dense: list[tuple[Part, int | None]], layer: int | None, file: str) -> dict[str, int]:
    """Place -> bytes there of a layer's dense parts, or of those outside the layers."""
    found: Counter[str] = Counter()
    for part, its_layer in dense:
        if its_layer == layer and part.what != LEFT:
            found[file if part.place == MAPPED else part.place] += part.nbytes
    return dict(found.most_common())


def _unreplaced(model: Any, source: AnySource) -> Unreplaced | None:
    """The experts whose parameters are left in the model."""
    names = []
    nbytes = 0
    stored = 0
    for name, value in missing_parameters(model, source.config).items():
        if not _of_experts(name):
            continue
        names.append(name.rpartition(".")[0])
        nbytes += value.numel() * value.element_size()
        stored += sum(source.store.info(part).nbytes for part in source.parts(name))
    if not names:
        return None
    return Unreplaced(grouped(list(dict.fromkeys(names))), nbytes, stored)


def _of_experts(name: str) -> bool:
    return name.endswith(EXPERTS)
