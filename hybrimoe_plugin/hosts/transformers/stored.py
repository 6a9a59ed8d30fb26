"""Matrices that stay as the file stores them: which operators take them, and handing them over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from hybrimoe_plugin.compute.cpu.requantise import (
    Requantised,
    Requantiser,
    bytes_in,
    readable_types,
    replacement,
)
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.errors import BackendError, WeightsError
from hybrimoe_plugin.families.registry import names_of
from hybrimoe_plugin.hosts.transformers.preparation.accelerators import computes_alone
from hybrimoe_plugin.injection.match import Match
from hybrimoe_plugin.operators.dense import DenseOperator, stored_kernels
from hybrimoe_plugin.operators.device_linear import DeviceLinear
from hybrimoe_plugin.operators.embedding import QuantizedEmbedding
from hybrimoe_plugin.operators.linear import GgmlLinear
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.weights.find_experts import AnySource, source_of
from hybrimoe_plugin.weights.gguf_names import GGUFNames
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.parameter_source import kv_b_parts
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_MOST_OF_FREE = 0.5
"""Share of the free memory that the weights may take unasked; beyond, a mapped file is the safer
choice.
"""


def without_plain(plan: Sequence[Match]) -> list[Match]:
    """The plan without dense operators where `dense: plain` asks for the model's own modules."""
    return [
        match for match in plan if not (_is_dense(match) and match.kwargs.get("dense") == "plain")
    ]


def without_foreign(
    plan: Sequence[Match], store: GGUFStore | None, names: GGUFNames
) -> list[Match]:
    """The plan without operators for plain modules that are not plain.

    These are modules of a class of the model's own, such as an embedding that scales what it gives,
    and those whose values GGUF files store changed.
    """
    kept = []
    for match in plan:
        plain = getattr(match.operator_class, "plain_class", None)
        own_class = plain is not None and match.original != plain.__name__
        changed = (
            store is not None
            and store.directory is None
            and _is_changed(f"{match.name}.weight", store, names)
        )
        if not own_class and not (plain is not None and changed):
            kept.append(match)
    return kept


def _is_changed(parameter: str, store: GGUFStore, names: GGUFNames) -> bool:
    """Whether no bytes of the file are the matrix's own."""
    return names.change(parameter) is not None or bool(kv_b_parts(parameter, store))


def keeps_stored(match: Match, store: GGUFStore) -> bool:
    """Whether the match's operator will read matrices as stored. Raises: as `stored_kernels`."""
    if not _is_dense(match):
        return False
    settings = dict(match.kwargs)
    devices = [settings.pop(name, "auto") for name in ("prefill_device", "generate_device")]
    return stored_kernels(store, Settings.of(settings), *devices) is not None


def reads_into_memory(plan: Sequence[Match], store: GGUFStore) -> bool:
    """Whether loading reads the file into memory: where the settings say so.

    `auto` does where the CPU computes alone and there is room, and with a file that any user may
    write to.

    Raises:
        WeightsError: any user may write to the file, and it does not fit.
    """
    asked = {str(match.kwargs.get("weights", "auto")) for match in plan if match.replaces}
    if "memory" in asked:
        return True
    fits = store.nbytes <= _MOST_OF_FREE * free_host_bytes()
    if asked == {"auto"} and store.others_may_write:
        if not fits:
            raise WeightsError(
                f"{store.paths[0]}: any user may write to the file, and cutting it would end the "
                "process that reads it where it lies; take the right away (chmod o-w), or accept "
                "it with weights='mapped'"
            )
        return True
    on_cpu = computes_alone(plan) and any(keeps_stored(match, store) for match in plan)
    return asked == {"auto"} and on_cpu and fits


def give_stored(model: nn.Module, store: GGUFStore, config: Any) -> None:
    """Hand every operator its matrices.

    They are mapped, and copied only where rows must change places.

    Matrices on the CPU in a type without a kernel are requantised to Q8_0; `predict` has counted
    and named them.

    Raises:
        WeightsError, BackendError: a tensor is missing, has another shape, or is of a type without
            a kernel.

    Mutates: `model`.
    """
    source = source_of(store, config, names_of(config.model_type))
    for matrix in stored_matrices(model):
        try:
            matrix.give(source)
        except BackendError as error:
            tensors = " and ".join(source.gguf_names(matrix.parameter))
            raise BackendError(f"{store.paths[0]}: {tensors}: {error}") from None


class StoredSize(NamedTuple):
    """Bytes of a matrix that stays as stored."""

    in_file: int
    replaced: int
    """Of them, those that a copy takes the place of."""
    copied: int
    """Bytes of the copy."""


class StoredMatrix(NamedTuple):
    """A module that reads a matrix as the file stores it, and the parameter that this is."""

    module: nn.Module
    parameter: str
    """Name that it has in the plain model."""

    @property
    def on_device(self) -> bool:
        """Whether an accelerator may hold it; else it is the CPU's."""
        return isinstance(self.module, DeviceLinear)

    def give(self, source: AnySource) -> None:
        """Hand the matrix over. Raises: as `give_stored`."""
        module: Any = self.module
        if isinstance(module, FusedMLA):
            parts = source.stored_kv_b(self.parameter)
            key, value = (_for_kernels(part, source) for part in parts)
            module.take_kv_b(key, value)
            return
        stored = source.stored(self.parameter)
        if not self.on_device:
            stored = _for_kernels(stored, source)
        module.take(stored)

    def size(self, source: AnySource) -> StoredSize:
        """What `give` will take, from the file's header. Raises: WeightsError: it is missing."""
        replaced = copied = whole = 0
        types = frozenset() if self.on_device else readable_types()
        for info in map(source.store.info, source.gguf_names(self.parameter)):
            whole += info.nbytes
            if self.on_device:
                dense = self._dense_bytes(info.type_name)
                replaced += info.nbytes if dense else 0
                copied += dense
            elif info.type_name not in types:
                replaced += info.nbytes
                copied += bytes_in(replacement(info.type_name, types), info.shape)
            elif source.is_rearranged(self.parameter):
                replaced += info.nbytes
                copied += info.nbytes
        return StoredSize(whole, replaced, copied)

    def requantised(self, source: AnySource) -> Iterator[Requantised]:
        """Those of its tensors that `give` makes larger for want of a kernel. Raises: as `size`."""
        types = frozenset() if self.on_device else readable_types()
        for info in map(source.store.info, source.gguf_names(self.parameter)):
            kind, names, stored = info.type_name, (info.name,), info.nbytes
            if self.on_device:
                nbytes = self._dense_bytes(kind)
                if nbytes > stored:
                    target = str(self.module.dense.dtype).removeprefix("torch.")
                    yield Requantised(kind, target, names, stored, nbytes, on_device=True)
            elif kind not in types:
                target = replacement(kind, types)
                yield Requantised(kind, target, names, stored, bytes_in(target, info.shape))

    def _dense_bytes(self, type_name: str) -> int:
        """Bytes of the dequantised matrix where a device has no kernel for its type, else 0."""
        if not isinstance(self.module, DeviceLinear):
            return 0
        return self.module.dense_bytes(type_name)


def stored_matrices(model: nn.Module) -> Iterator[StoredMatrix]:
    """The matrices of an injected model that stay as the file stores them."""
    for name, module in model.named_modules():
        if isinstance(module, GgmlLinear | DeviceLinear):
            yield StoredMatrix(module, f"{name.removesuffix('.stored')}.weight")
        elif isinstance(module, QuantizedEmbedding) and module.ggml is not None:
            yield StoredMatrix(module, f"{name}.weight")
        elif isinstance(module, FusedMLA) and module.ggml is not None:
            yield StoredMatrix(module, f"{name}.kv_b_proj.weight")


def _for_kernels(stored: QuantizedMatrix, source: AnySource) -> QuantizedMatrix:
    """The matrix, or a copy of it in a type that has a kernel on the CPU."""
    types = readable_types()
    if stored.type_name in types:
        return stored
    target = replacement(stored.type_name, types)
    requantiser = source.store.companion(Requantiser)
    data = requantiser.convert(stored.data, stored.type_name, target)
    return QuantizedMatrix(data, target, stored.shape)


def _is_dense(match: Match) -> bool:
    return match.operator_class is not None and issubclass(match.operator_class, DenseOperator)
