"""CPU experts on kt-kernel: quantised kernels on the mapped bytes, a mask per call.

kt-kernel aborts the whole process on what it does not know, so everything is checked here first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.expert_inputs import check_kinds, check_range, check_shapes
from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel, quiet_stdout
from hybrimoe_plugin.compute.cpu.requantise import readable_types, supported_weights
from hybrimoe_plugin.core import SILU, ExpertSpec
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

INTERMEDIATE_MULTIPLE = 256
GROUPED_HIDDEN_MULTIPLE = 256
"""Hidden sizes that kt-kernel's path for many tokens computes right are multiples of this.

From `group_min_len` tokens on, kt-kernel 0.7.2 computes the down projection in tiles of 256 rows
and leaves what is over untouched: with hidden size 576 the last 64 values of every token are wrong.
Other sizes stay on the path for few tokens, which is right but about 2.4 times slower in prefill
(docs/LOG.md).
"""
_GROUP_MIN_TOKENS = 10
_MAX_TOKENS = 1024
"""Tokens per native call; longer calls are cut, since the kernel's buffers grow with this."""


def refusal(spec: ExpertSpec) -> str | None:
    """Why the kernels cannot run such experts, None if they can."""
    if spec.activation != SILU or spec.bias_bytes:
        return "they compute SwiGLU without biases, and these experts do not"
    if spec.intermediate % INTERMEDIATE_MULTIPLE:
        return (
            f"expert intermediate size {spec.intermediate} is not a multiple of "
            f"{INTERMEDIATE_MULTIPLE}"
        )
    if spec.hidden % 32:
        return f"hidden size {spec.hidden} is not a multiple of 32"
    return None


class _Pending(NamedTuple):
    """A submitted call.

    The kernel reads and writes these tensors from its own threads: they must outlive the call,
    wherever it is interrupted.
    """

    output: torch.Tensor
    """[T, H] bfloat16."""
    dtype: torch.dtype
    """The caller's."""
    nan_rows: torch.Tensor | None
    """[T] bool: rows of hidden with a NaN; None without any."""
    inputs: tuple[torch.Tensor, ...]


class KTExperts:
    """kt-kernel's MoE on one pool of worker threads of its own.

    Layers in types that the kernels lack are requantised, which makes a copy.

    Args:
        threads: workers; measure before using every core, they spin (see docs/LOG.md).

    Raises:
        BackendError: kt-kernel does not load.
    """

    name = "kt"

    def __init__(self, threads: int) -> None:
        self._kernel = import_kernel()
        with quiet_stdout():
            self._infer = self._kernel.CPUInfer(threads)
        self.threads = self.workers = threads
        self._types = readable_types("kt")
        self._layers: list[_Layer] = []
        self._pending: _Pending | None = None

    def add_layer(self, weights: LayerWeights) -> None:
        """Raises: BackendError: the shape cannot be run at all."""
        reason = refusal(weights.spec)
        if reason is not None:
            raise BackendError(
                f"layer {weights.layer}: kt-kernel cannot run these experts: {reason}"
            )
        supported = supported_weights(weights, self._types)
        layer = _Layer(self._kernel, self._infer, supported, len(self._layers))
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
        self._pending = _Pending(output, hidden.dtype, _nan_rows(hidden), (states, ids, weights))
        for start in range(0, len(states), _MAX_TOKENS):
            part = slice(start, start + _MAX_TOKENS)
            if start:
                self._infer.sync()
            self._infer.submit(target.task(states[part], ids[part], weights[part], output[part]))

    def sync(self) -> torch.Tensor:
        assert self._pending is not None, "sync without submit"
        self._infer.sync()
        output, dtype, nan_rows, _ = self._pending
        if nan_rows is not None:
            output[nan_rows] = math.nan
        self._pending = None
        return output.to(dtype)

    def abandon(self) -> None:
        if self._infer is not None:
            self._infer.sync()
        self._pending = None

    def close(self) -> None:
        self.abandon()
        with quiet_stdout():
            self._layers.clear()
            self._infer = None


class _Layer:
    """One native MoE object, its mask and the bytes it points into."""

    def __init__(self, kernel: ModuleType, infer: Any, weights: LayerWeights, index: int) -> None:
        self.spec = spec = weights.spec
        self._mask = np.zeros(spec.experts, dtype=np.uint8)
        self._mine: tuple[int, ...] | None = None
        self._batch = torch.zeros(1, dtype=torch.int32, device="cpu")
        self._bytes = [_contiguous(matrix) for matrix in weights.matrices()]
        gate, up, down = self._bytes
        config = kernel.moe.MOEConfig(
            spec.experts, spec.top_k, spec.hidden, spec.intermediate, self._mask.ctypes.data
        )
        config.layer_idx = index
        config.pool = infer.backend_
        config.m_block = 32
        config.group_min_len = _GROUP_MIN_TOKENS
        if spec.hidden % GROUPED_HIDDEN_MULTIPLE:
            config.group_min_len = _MAX_TOKENS + 1  # never
        config.max_len = _MAX_TOKENS
        config.group_max_len = _MAX_TOKENS
        config.gate_proj = gate.ctypes.data
        config.up_proj = up.ctypes.data
        config.down_proj = down.ctypes.data
        config.gate_type = _type_number(spec.gate_type)
        config.up_type = _type_number(spec.up_type)
        config.down_type = _type_number(spec.down_type)
        config.hidden_type = int(kernel.kvcache.ggml_type.BF16)
        identity = np.arange(spec.experts, dtype=np.int64)
        with quiet_stdout():
            self._moe = kernel.moe.MOE(config)
            infer.submit(self._moe.load_weights_task(identity.ctypes.data))
            infer.sync()

    def set_mask(self, mine: Sequence[int]) -> None:
        """Let the next calls compute these experts only."""
        chosen = tuple(mine)
        if chosen != self._mine:
            self._mine = None  # until the mask is complete
            self._mask.fill(1)  # 1 skips an expert; read by the kernel at each call
            self._mask[list(chosen)] = 0
            self._mine = chosen

    def task(
        self, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, output: torch.Tensor
    ) -> tuple[int, int]:
        """What `CPUInfer.submit` takes for one call."""
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


def _type_number(type_name: str) -> int:
    return int(GGMLQuantizationType[type_name])


def _contiguous(matrix: Matrix) -> NDArray[np.uint8]:
    """All experts' bytes at one address; experts that are kept apart in the file are copied."""
    if matrix.stacked is not None:
        return matrix.stacked
    return np.concatenate(matrix.experts)


def _check(
    spec: ExpertSpec, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Raises: BackendError: something that the kernel must not see."""
    check_kinds(hidden, ids, weights)
    check_shapes(spec, hidden, ids, weights)
    top_k = ids.shape[1]
    if not 1 <= top_k <= min(spec.top_k, spec.experts):
        raise BackendError(f"K must be 1 to {spec.top_k}, found {top_k}")
    if len(ids):
        check_range(spec, int(ids.min()), int(ids.max()))


def _nan_rows(hidden: torch.Tensor) -> torch.Tensor | None:
    """[T] bool: rows with a NaN; None without any.

    Products with quantised matrices would round a NaN to a number.
    """
    if not math.isnan(hidden.sum(dtype=torch.float32)):
        return None
    return hidden.isnan().any(dim=1)
