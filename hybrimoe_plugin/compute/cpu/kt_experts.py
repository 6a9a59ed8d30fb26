"""CPU experts on kt-kernel: quantised kernels on the mapped bytes, a mask per call.

kt-kernel aborts the whole process on what it does not know, so everything is checked here first.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel, kernel_types, variant_name
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

log = logging.getLogger(__name__)


INTERMEDIATE_MULTIPLE = 256
GROUPED_HIDDEN_MULTIPLE = 256
"""From `group_min_len` tokens on, kt-kernel 0.7.2 computes the down projection in tiles of 256 rows
and leaves what is over untouched: with hidden size 576 the last 64 values of every token are wrong.
Other sizes stay on the path for few tokens, which is right but about 2.4 times slower in prefill
(docs/LOG.md).
"""
_IDS = (torch.int64, torch.int32)
_GROUP_MIN_TOKENS = 10
_MAX_TOKENS = 1024
"""Tokens per native call; longer calls are cut, since the kernel's buffers grow with this."""


def refusal(spec: ExpertSpec) -> str | None:
    """Why the kernels cannot run experts of this shape, None if they can."""
    if spec.intermediate % INTERMEDIATE_MULTIPLE:
        return (
            f"expert intermediate size {spec.intermediate} is not a multiple of "
            f"{INTERMEDIATE_MULTIPLE}"
        )
    if spec.hidden % 32:
        return f"hidden size {spec.hidden} is not a multiple of 32"
    return None


class KTExperts:
    """kt-kernel's MoE on one pool of worker threads of its own.

    Layers in types that the kernels lack are requantised, which makes a copy and logs a notice.

    Args:
        threads: workers; measure before using every core, they spin (see docs/LOG.md).

    Raises:
        BackendError: kt-kernel does not load.
    """

    name = "kt"

    def __init__(self, threads: int) -> None:
        self._kernel = import_kernel()
        with _quiet():
            self._infer = self._kernel.CPUInfer(threads)
        self.threads = self.workers = threads
        self._types = kernel_types(variant_name())
        self._layers: list[_Layer] = []
        self._pending: tuple[torch.Tensor, torch.dtype, torch.Tensor | None] | None = None
        """(output, the caller's dtype, rows that hold a NaN)."""
        self._keep: tuple[Any, ...] = ()

    def add_layer(self, weights: LayerWeights) -> None:
        """Raises: BackendError: the shape cannot be run at all."""
        reason = refusal(weights.spec)
        if reason is not None:
            raise BackendError(
                f"layer {weights.layer}: kt-kernel cannot run these experts: {reason}"
            )
        known = _supported(weights, self._types)
        layer = _Layer(self._kernel, self._infer, known, len(self._layers))
        self._layers.append(layer)

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        """Raises: BackendError: a shape, dtype or id that the kernel must not see."""
        if self._pending is not None:
            self.sync()
        target = self._layers[layer]
        _check(target.spec, hidden, topk_ids, topk_weights)
        states = hidden.to(torch.bfloat16).contiguous()
        ids = topk_ids.to(torch.int64).contiguous()
        weights = topk_weights.to(torch.float32).contiguous()
        output = torch.empty_like(states)
        target.set_mask(mine)
        # The kernel reads these from its own thread: they must outlive the call, wherever it is
        # interrupted.
        self._keep = (states, ids, weights, output)
        self._pending = output, hidden.dtype, _nan_rows(hidden)
        for start in range(0, len(states), _MAX_TOKENS):
            part = slice(start, start + _MAX_TOKENS)
            if start:
                self._infer.sync()
            self._infer.submit(target.task(states[part], ids[part], weights[part], output[part]))

    def sync(self) -> torch.Tensor:
        assert self._pending is not None, "sync without submit"
        self._infer.sync()
        output, dtype, lost = self._pending
        if lost is not None:
            output[lost] = math.nan
        self._pending = None
        self._keep = ()
        return output.to(dtype)

    def abandon(self) -> None:
        if self._infer is not None:
            self._infer.sync()
        self._pending = None
        self._keep = ()

    def close(self) -> None:
        self.abandon()
        with _quiet():
            self._layers.clear()
            self._infer = None


class _Layer:
    """One native MoE object, its mask and the bytes it points into."""

    def __init__(self, kernel: ModuleType, infer: Any, weights: LayerWeights, index: int) -> None:
        self.spec = weights.spec
        self._mask = np.zeros(weights.spec.experts, dtype=np.uint8)
        self._mine: tuple[int, ...] | None = None
        self._batch = torch.zeros(1, dtype=torch.int32, device="cpu")
        self._bytes = [_contiguous(matrix) for matrix in weights.matrices()]
        spec, types = weights.spec, kernel.kvcache.ggml_type
        config = kernel.moe.MOEConfig(
            spec.experts, spec.top_k, spec.hidden, spec.intermediate, self._mask.ctypes.data
        )
        config.layer_idx = index
        config.pool = infer.backend_
        config.m_block = 32
        grouped = spec.hidden % GROUPED_HIDDEN_MULTIPLE == 0
        config.group_min_len = _GROUP_MIN_TOKENS if grouped else _MAX_TOKENS + 1
        config.max_len = _MAX_TOKENS
        config.group_max_len = _MAX_TOKENS
        config.gate_proj, config.up_proj, config.down_proj = (
            part.ctypes.data for part in self._bytes
        )
        config.gate_type = _ggml(spec.gate_type)
        config.up_type = _ggml(spec.up_type)
        config.down_type = _ggml(spec.down_type)
        config.hidden_type = int(types.BF16)
        identity = np.arange(spec.experts, dtype=np.int64)
        with _quiet():
            self._moe = kernel.moe.MOE(config)
            infer.submit(self._moe.load_weights_task(identity.ctypes.data))
            infer.sync()

    def set_mask(self, mine: Sequence[int]) -> None:
        """True skips an expert; read by the kernel at each call."""
        chosen = tuple(mine)
        if chosen != self._mine:
            self._mine = None  # until the mask is whole
            self._mask.fill(1)
            self._mask[list(chosen)] = 0
            self._mine = chosen

    def task(
        self, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, output: torch.Tensor
    ) -> tuple[int, int]:
        self._batch = torch.tensor([len(states)], dtype=torch.int32, device="cpu")
        task: tuple[int, int] = self._moe.forward_task(
            self._batch.data_ptr(),
            ids.shape[1],
            ids.data_ptr(),
            weights.data_ptr(),
            states.data_ptr(),
            output.data_ptr(),
            False,
        )
        return task


_STDOUT = threading.RLock()
"""The process has one standard output: of two threads that both put it aside, the second would give
back the sink.
"""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the kernel's greetings, which C++ writes to standard output, out of the user's
    answer.
    """
    flush = ctypes.CDLL(
        None
    ).fflush  # what C has buffered must go where it was meant to go, before and after
    with _STDOUT:
        sys.stdout.flush()
        flush(None)
        kept, sink = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(sink, 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            os.close(sink)


def _ggml(type_name: str) -> int:
    return int(GGMLQuantizationType[type_name])


def _contiguous(matrix: Matrix) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The kernel takes one base pointer: experts kept apart in the file must be copied together."""
    return matrix.stacked if matrix.stacked is not None else np.concatenate(matrix.experts)


def _supported(weights: LayerWeights, types: frozenset[str]) -> LayerWeights:
    """The same layer with every matrix in one of these types, which the kernels run."""
    changes: dict[str, Matrix] = {}
    for index, part in enumerate(("gate", "up", "down")):
        matrix: Matrix = getattr(weights, part)
        if matrix.type_name in types:
            continue
        target = _replacement(matrix.type_name, types)
        log.warning(
            "layer %d: no kernel for %s experts in %s; requantised to %s, which takes a copy in "
            "memory",
            weights.layer,
            part,
            matrix.type_name,
            target,
        )
        stored = [
            _requantised(weights.dequantized(expert)[index].numpy(), target)
            for expert in range(weights.spec.experts)
        ]
        stacked = np.concatenate(stored)
        changes[part] = Matrix(target, tuple(stacked.reshape(weights.spec.experts, -1)), stacked)
    if not changes:
        return weights
    fields: dict[str, Any] = {f"{part}_type": matrix.type_name for part, matrix in changes.items()}
    fields.update({f"{part}_bytes": matrix.experts[0].size for part, matrix in changes.items()})
    return replace(weights, spec=replace(weights.spec, **fields), **changes)  # type: ignore[arg-type]


def _replacement(type_name: str, types: frozenset[str]) -> str:
    """The type that loses least: a 16-bit one for floats, else Q8_0."""
    if type_name not in ("F32", "BF16"):
        return "Q8_0"
    return "BF16" if "BF16" in types else "F16"


def _requantised(values: NDArray[np.float32], target: str) -> NDArray[np.uint8]:
    if target == "F16" and not np.abs(values).max() <= np.finfo(np.float16).max:
        raise BackendError(
            "weights beyond the range of F16: kt-kernel has no kernel for them on this processor"
        )
    return quantize(values, GGMLQuantizationType[target]).view(np.uint8).ravel()


def _check(
    spec: ExpertSpec, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    check_kinds(hidden, ids, weights)
    if hidden.ndim != 2 or hidden.shape[1] != spec.hidden:
        raise BackendError(f"hidden states must be [T, {spec.hidden}], found {list(hidden.shape)}")
    if ids.shape != weights.shape or ids.ndim != 2 or len(ids) != len(hidden):
        raise BackendError(
            f"ids {list(ids.shape)} and weights {list(weights.shape)} must be [{len(hidden)}, K]"
        )
    if not 1 <= ids.shape[1] <= spec.experts or ids.shape[1] > spec.top_k:
        raise BackendError(f"K must be 1 to {spec.top_k}, found {ids.shape[1]}")
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < spec.experts):
        raise BackendError(
            f"expert ids must be 0 to {spec.experts - 1}, found {int(ids.min())} to "
            f"{int(ids.max())}"
        )


def _nan_rows(hidden: torch.Tensor) -> torch.Tensor | None:
    """[T] bool: rows with a NaN, which products with quantised matrices would round to a number;
    None without any.
    """
    if not math.isnan(hidden.sum(dtype=torch.float32)):
        return None
    return hidden.isnan().any(dim=1)


def check_kinds(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Raises: BackendError: not on the CPU, or of a type that a kernel's conversion would change
    without a word.
    """
    # Attributes in one expression: this is asked in every layer of every token.
    if not (
        hidden.is_cpu
        and weights.is_cpu
        and hidden.is_floating_point()
        and weights.is_floating_point()
    ):
        for what, tensor in (("hidden states", hidden), ("expert weights", weights)):
            if not (tensor.is_cpu and tensor.is_floating_point()):
                raise BackendError(
                    f"{what} must be floating point on the CPU, found {tensor.dtype} on "
                    f"{tensor.device}"
                )
    if not ids.is_cpu or ids.dtype not in _IDS:
        raise BackendError(
            f"expert ids must be int64 or int32 on the CPU, found {ids.dtype} on {ids.device}"
        )
