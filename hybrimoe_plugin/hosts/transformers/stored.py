"""Matrices that stay as the file stores them: which operators take them, and handing them over."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from hybrimoe_plugin.compute.cpu.ggml import TYPES
from hybrimoe_plugin.compute.cpu.repack import requantised
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.memory import check_host, free_host_bytes
from hybrimoe_plugin.errors import BackendError, WeightsError
from hybrimoe_plugin.families.registry import names_of
from hybrimoe_plugin.injection.match import Match
from hybrimoe_plugin.operators.dense import DenseOperator, stored_kernels
from hybrimoe_plugin.operators.device_linear import DeviceLinear
from hybrimoe_plugin.operators.embedding import QuantizedEmbedding
from hybrimoe_plugin.operators.linear import GgmlLinear
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.parameter_source import ParameterSource
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

log = logging.getLogger(__name__)

_MOST_OF_FREE = 0.5
"""Share of the free memory that the weights may take unasked; beyond, a mapped file is the safer
choice.
"""


def without_plain(plan: Sequence[Match]) -> list[Match]:
    """The plan without dense operators where `dense: plain` asks for the model's own modules."""
    return [
        match for match in plan if not (_is_dense(match) and match.kwargs.get("dense") == "plain")
    ]


def keeps_stored(match: Match, store: GGUFStore) -> bool:
    """Whether the match's operator will read matrices as stored. Raises: as `stored_kernels`."""
    if not _is_dense(match):
        return False
    settings = dict(match.kwargs)
    devices = [settings.pop(name, "auto") for name in ("prefill_device", "generate_device")]
    return stored_kernels(store, Settings.of(settings), *devices) is not None


def read_if_worth_it(plan: Sequence[Match], store: GGUFStore) -> None:
    """Read the file into memory where the settings say so.

    `auto` does where the CPU computes alone and there is room.

    With `auto` so is a file that any user may write to.

    Raises:
        BudgetError: asked for, and it does not fit.
        WeightsError: the file cannot be read, or any user may write to it and it does not fit.

    Mutates: `store`.
    """
    asked = {str(match.kwargs.get("weights", "auto")) for match in plan if match.replaces}
    if "memory" in asked:
        check_host(store.nbytes, "the weights")
        store.read_into_memory()
        return
    fits = store.nbytes <= _MOST_OF_FREE * free_host_bytes()
    if asked == {"auto"} and store.others_may_write:
        if not fits:
            raise WeightsError(
                f"{store.paths[0]}: any user may write to the file, and cutting it would end the "
                "process that reads it where it lies; take the right away (chmod o-w), or accept "
                "it with weights='mapped'"
            )
        store.read_into_memory()
        return
    alone = all(match.kwargs.get("accelerator", "auto") in ("auto", "none") for match in plan)
    on_cpu = alone and any(keeps_stored(match, store) for match in plan)
    if asked == {"auto"} and on_cpu and fits:
        store.read_into_memory()


def give_stored(model: nn.Module, store: GGUFStore, config: Any) -> None:
    """Hand every operator its matrices.

    They are mapped, and copied only where rows must change places.

    Matrices on the CPU in a type without a kernel are requantised to Q8_0, with a notice.

    Raises:
        WeightsError, BackendError: a tensor is missing, has another shape, or is of a type without
            a kernel.

    Mutates: `model`.
    """
    source = ParameterSource(store, config, names_of(config.model_type))
    for name, module in model.named_modules():
        parameter = f"{name.removesuffix('.stored')}.weight"
        try:
            if isinstance(module, GgmlLinear):
                module.take(_for_kernels(source.stored(parameter), parameter))
            elif isinstance(module, DeviceLinear):
                module.take(source.stored(parameter))
            elif isinstance(module, QuantizedEmbedding) and module.ggml is not None:
                module.take(_for_kernels(source.stored(parameter), parameter))
            elif isinstance(module, FusedMLA) and module.ggml is not None:
                parameter = f"{name}.kv_b_proj.weight"
                key, value = (
                    _for_kernels(part, parameter) for part in source.stored_kv_b(parameter)
                )
                module.take_kv_b(key, value)
        except BackendError as error:
            tensors = " and ".join(source.gguf_names(parameter))
            raise BackendError(f"{store.paths[0]}: {tensors}: {error}") from error


def _for_kernels(stored: QuantizedMatrix, name: str) -> QuantizedMatrix:
    if stored.type_name in TYPES:
        return stored
    made = requantised(stored)
    log.warning(
        "%s: no kernel for %s; requantised to %s, which takes a copy in memory",
        name,
        stored.type_name,
        made.type_name,
    )
    return made


def _is_dense(match: Match) -> bool:
    return match.operator_class is not None and issubclass(match.operator_class, DenseOperator)
