"""`cpuinfer_ext` on kt-kernel, as far as kTransformers' `KExpertsCPU` uses it.

No thread starts before the first task: kTransformers makes its pools while it is imported, with ten
threads each, before it has read `--cpu_infer`. Weights are the pointers that it passes, seen as
arrays and not copied.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.compute.cpu.kt_experts import KTExperts
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix


@dataclass(frozen=True)
class MOEConfig:
    """A layer's experts: shapes, pointers and GGML types, in the compiled module's order."""

    expert_num: int
    routed_expert_num: int
    hidden_size: int
    intermediate_size: int
    stride: int
    group_min_len: int
    group_max_len: int
    gate_proj: int
    up_proj: int
    down_proj: int
    gate_type: int
    up_type: int
    down_type: int
    hidden_type: int

    def weights(self) -> LayerWeights:
        """The layer as the backend takes it; valid while the caller keeps the memory.

        Raises:
            BackendError: a hidden type other than bfloat16.
        """
        if self.hidden_type != GGMLQuantizationType.BF16:
            raise BackendError(
                f"hidden states of GGML type {self.hidden_type} are not supported, only bfloat16"
            )
        inner = self.intermediate_size, self.hidden_size
        outer = self.hidden_size, self.intermediate_size
        gate = _matrix(self.gate_proj, self.gate_type, self.expert_num, inner)
        up = _matrix(self.up_proj, self.up_type, self.expert_num, inner)
        down = _matrix(self.down_proj, self.down_type, self.expert_num, outer)
        spec = ExpertSpec(
            hidden=self.hidden_size,
            intermediate=self.intermediate_size,
            experts=self.expert_num,
            top_k=self.routed_expert_num,
            gate_type=gate.type_name,
            up_type=up.type_name,
            down_type=down.type_name,
            gate_bytes=gate.experts[0].size,
            up_bytes=up.experts[0].size,
            down_bytes=down.experts[0].size,
        )
        return LayerWeights(0, spec, gate, up, down)


class Task(NamedTuple):
    """One call of a layer, as pointers.

    Ids [T, K] int64, weights [T, K] float32, states and output [T, H] bfloat16.
    """

    moe: MOE
    tokens: int
    top_k: int
    ids: int
    weights: int
    states: int
    output: int


class MOE:
    """One layer's experts."""

    def __init__(self, config: MOEConfig) -> None:
        self.config = config

    def forward(
        self, tokens: int, top_k: int, ids: int, weights: int, states: int, output: int
    ) -> Task:
        return Task(self, tokens, top_k, ids, weights, states, output)

    def warm_up(self) -> Task:
        """A call without tokens: the layer is given to the workers."""
        return Task(self, 0, 1, 0, 0, 0, 0)


class CPUInfer:
    """Worker threads, started by the first task.

    Args:
        threads: how many, unless kTransformers' settings say otherwise by then; never all cores,
            the workers spin.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._workers: KTExperts | None = None
        self._places: dict[int, tuple[MOE, int]] = {}
        self._pending: tuple[KTExperts, torch.Tensor] | None = None

    def submit(self, task: Task) -> None:
        self.sync()
        workers, place = self._place(task.moe)
        if task.tokens == 0:
            return
        shape = task.tokens, task.top_k
        states = _tensor(task.states, (task.tokens, task.moe.config.hidden_size), torch.bfloat16)
        output = _tensor(task.output, (task.tokens, task.moe.config.hidden_size), torch.bfloat16)
        ids = _tensor(task.ids, shape, torch.int64)
        workers.submit(
            place,
            states,
            ids,
            _tensor(task.weights, shape, torch.float32),
            range(task.moe.config.expert_num),
        )
        self._pending = workers, output

    def sync(self) -> None:
        """Wait for the task and write its output."""
        if self._pending is not None:
            workers, output = self._pending
            self._pending = None
            output.copy_(workers.sync())

    def submit_with_cuda_stream(self, stream: int, task: Task) -> None:
        """As `submit`, after the stream's earlier work.

        Raises:
            BackendError: the stream is being captured.
        """
        _wait_for(stream)
        self.submit(task)

    def sync_with_cuda_stream(self, stream: int) -> None:
        self.sync()

    def _place(self, moe: MOE) -> tuple[KTExperts, int]:
        if self._workers is None:
            self._workers = _start(self._threads)
            weakref.finalize(self, self._workers.close)
        if id(moe) not in self._places:
            self._workers.add_layer(moe.config.weights())
            self._places[id(moe)] = moe, len(self._places)  # keeps it, or its id could be another's
        return self._workers, self._places[id(moe)][1]


def _start(threads: int) -> KTExperts:
    """Start the workers; torch keeps the cores that they leave, as in the engine."""
    try:
        config = importlib.import_module("ktransformers.server.config.config").Config()
        threads = int(
            config.cpu_infer
        )  # `--cpu_infer` arrives here after the import has passed the default
    except Exception:  # the stand-in may be used alone
        pass
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = max(1, min(threads, cores - 1))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - threads)))
    return KTExperts(threads)


def _wait_for(stream: int) -> None:
    if not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "experts on kt-kernel cannot be captured in a CUDA graph: start with --use_cuda_graph "
            "False"
        )
    # torch takes a null pointer for "make me a new stream", which would be awaited in vain.
    found = torch.cuda.ExternalStream(stream) if stream else torch.cuda.default_stream()
    found.synchronize()


def _matrix(address: int, kind: int, experts: int, shape: tuple[int, int]) -> Matrix:
    name = GGMLQuantizationType(kind).name
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    size = shape[0] * shape[1] // block * block_bytes
    stacked = np.frombuffer(_memory(address, experts * size), dtype=np.uint8)
    return Matrix(name, tuple(stacked.reshape(experts, size)), stacked)


def _tensor(address: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(
        _memory(address, shape[0] * shape[1] * dtype.itemsize), dtype=dtype
    ).reshape(shape)


def _memory(address: int, size: int) -> Any:
    return (ctypes.c_uint8 * size).from_address(address)


class _Missing:
    """A part of the compiled module that has no counterpart here."""

    def __init__(self, what: str, instead: str) -> None:
        self._message = f"{what} of cpuinfer_ext was not compiled and has no stand-in: {instead}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise BackendError(self._message)


linear = _Missing("linear", "use KLinearTorch in the rules")
mlp = _Missing("mlp", "use KTransformersExperts or plain modules in the rules")
kvcache = _Missing("kvcache", "--mode long_context needs the compiled module")
