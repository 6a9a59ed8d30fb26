"""ggml graphs on the caller's own thread: the C library that kt-kernel carries, through ctypes.

kt-kernel's own entry points are MoE layers on a pool of spinning workers. The extension also
exports the ggml library that these are built on, whose graphs run on the calling thread and OpenMP:
right for dense linears, and for experts where nothing else computes meanwhile. On 2 cores a matrix
of 8192 x 2048 in Q8_0 is read at 19 GB/s with two threads (docs/LOG.md).

ggml ends the process on what it does not know, so types, shapes, constants and the library's
version are checked here first. Its kernels for quantised matrices round activations to small
integers, which makes ordinary numbers of NaN: `Graph.spoiled` tells when that has happened.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
from hybrimoe_plugin.compute.cpu.thread_team import Team
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

CHECKED_VERSIONS = ("0.7.2",)
"""kt-kernel releases whose ggml has the structures declared below; others are refused rather than
tried.
"""

TYPES = frozenset(
    {
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    }
    | {"IQ4_NL", "IQ4_XS"}
)
"""GGML types that were tried against a float32 reference (tests/compute/test_ggml.py)."""

_FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types whose products keep NaN and infinity."""

_SMALL = np.full(1 << 14, 1e-30, np.float32)
_F32, _I32 = 0, 26
_Pointer = ctypes.c_void_p
_Int64 = ctypes.c_int64


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", _Pointer),
        ("no_alloc", ctypes.c_bool),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", _Pointer),
        ("n_threads", ctypes.c_int),
        ("abort_callback", _Pointer),
        ("abort_callback_data", _Pointer),
    ]


class Node(NamedTuple):
    """A tensor of a graph; `data` is its memory in torch's order of dimensions, None for stored
    weights.
    """

    pointer: int
    shape: tuple[int, ...]
    data: torch.Tensor | None
    type_name: str = "F32"

    @property
    def value(self) -> torch.Tensor:
        assert self.data is not None, "stored weights have no torch tensor"
        return self.data

    def fill(self, values: torch.Tensor) -> None:
        """Write values of this shape; no gradient flows through a graph, and none may hang on to
        its buffers.
        """
        self.value.copy_(values.detach())


class Pace(NamedTuple):
    """How fast one row is multiplied by matrices of a type that lie in memory, not in a cache."""

    indexed: bool
    """Whether `matmul_id` is as quick as `matmul` or quicker, even for a single matrix."""
    ns: float
    """That way's time for one value of the matrix."""


_LEVEL = 1.1
"""Most types use the same loop both ways, and then the indexed product is to be preferred: K
experts are one of it.
"""

_PACES: dict[tuple[str, int], Pace] = {}
"""By type and number of threads, as measured in this process."""


class Ggml:
    """The functions of the library, and the team of its graphs. Making one loads kt-kernel and
    tries a product.

    Raises:
        BackendError: kt-kernel is missing, of a release that was not checked, or exports no ggml.
    """

    def __init__(self) -> None:
        version = importlib.metadata.version("kt-kernel") if (kernel := import_kernel()) else ""
        if version not in CHECKED_VERSIONS:
            raise BackendError(
                f"ggml of kt-kernel {version} was not checked, only of "
                f"{', '.join(CHECKED_VERSIONS)}"
            )
        path = str(kernel.__file__)
        quick, slow = (
            ctypes.PyDLL(path),
            ctypes.CDLL(path),
        )  # only the computation is worth giving up the GIL for
        try:
            self.init = _function(quick.ggml_init, _Pointer, _InitParams)
            self.free = _function(quick.ggml_free, None, _Pointer)
            self.new_tensor = _function(
                quick.ggml_new_tensor,
                _Pointer,
                _Pointer,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.POINTER(_Int64),
            )
            self.matmul = _function(quick.ggml_mul_mat, _Pointer, _Pointer, _Pointer, _Pointer)
            self.matmul_id = _function(
                quick.ggml_mul_mat_id, _Pointer, _Pointer, _Pointer, _Pointer, _Pointer
            )
            self.get_rows = _function(quick.ggml_get_rows, _Pointer, _Pointer, _Pointer, _Pointer)
            self.silu = _function(quick.ggml_silu_inplace, _Pointer, _Pointer, _Pointer)
            self.mul = _function(quick.ggml_mul_inplace, _Pointer, _Pointer, _Pointer, _Pointer)
            self.add = _function(quick.ggml_add_inplace, _Pointer, _Pointer, _Pointer, _Pointer)
            self.view = _function(
                quick.ggml_view_3d,
                _Pointer,
                _Pointer,
                _Pointer,
                *[_Int64] * 3,
                *[ctypes.c_size_t] * 3,
            )
            self.rms_norm = _function(
                quick.ggml_rms_norm, _Pointer, _Pointer, _Pointer, ctypes.c_float
            )
            self.new_graph = _function(
                quick.ggml_new_graph_custom, _Pointer, _Pointer, ctypes.c_size_t, ctypes.c_bool
            )
            self.expand = _function(quick.ggml_build_forward_expand, None, _Pointer, _Pointer)
            self.plan = _function(quick.ggml_graph_plan, _Plan, _Pointer, ctypes.c_int)
            self.compute = _function(
                slow.ggml_graph_compute, ctypes.c_int, _Pointer, ctypes.POINTER(_Plan)
            )
            overhead = _function(quick.ggml_tensor_overhead, ctypes.c_size_t)()
            graph = _function(
                quick.ggml_graph_overhead_custom, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool
            )
            get_data = _function(quick.ggml_get_data, _Pointer, _Pointer)
        except AttributeError as error:
            raise BackendError(f"kt-kernel {version} does not export ggml: {error}") from error
        # An operation may make a view beside its result, hence twice the nodes.
        self._tensor_bytes, self._graph_bytes = overhead + 64, graph
        self.data_offset = self._find_data(get_data)
        self.team = Team()
        self._try()

    def context_bytes(self, nodes: int) -> int:
        """Memory for the structures of a graph of so many nodes; an operation may make a view
        beside its result.
        """
        return 2 * nodes * self._tensor_bytes + int(self._graph_bytes(nodes, False)) + 1024

    def pace(self, type_name: str, threads: int) -> Pace:
        """Measured once in a process, in some 100 ms.

        A plain product of one row goes through llamafile's tiles where they have the type. On an
        AMD EPYC they read Q8_0 at 7 GB/s a thread where ggml's own loop, which the indexed product
        uses, reads it at 20; on an Intel Xeon the tiles are twice as fast as the loop
        (docs/LOG.md).
        """
        key = type_name, threads
        if key not in _PACES:
            _PACES[key] = _measured(self, *key)
        return _PACES[key]

    def _find_data(self, get_data: Any) -> int:
        """Where a tensor keeps its data pointer, found by looking for one that is known."""
        buffer = np.zeros(1 << 16, np.uint8)
        context = self.init(_InitParams(buffer.size, buffer.ctypes.data, False))
        tensor = self.new_tensor(context, _F32, 1, (_Int64 * 1)(8))
        wanted = get_data(tensor)
        words = (ctypes.c_uint64 * 40).from_address(tensor)
        found = [8 * index for index, word in enumerate(words) if word == wanted]
        self.free(context)
        if len(found) != 1:
            raise BackendError("ggml in kt-kernel keeps its tensors in an unknown way")
        return found[0]

    def _try(self) -> None:
        """One small product, so that a surprise shows here."""
        weight = np.arange(64, dtype=np.float32)
        graph = Graph(self, 1)
        x = graph.input(1, 32)
        y = graph.matmul(
            graph.weight(QuantizedMatrix(weight.view(np.uint8), "F32", (2, 32))), x, indexed=False
        )
        graph.finish(y)
        x.value.fill_(1.0)
        graph.run()
        if y.value.tolist() != [[float(weight[:32].sum()), float(weight[32:].sum())]]:
            raise BackendError(f"ggml in kt-kernel computes wrongly: {y.value.tolist()}")


class Graph:
    """A few operations on fixed buffers, built once and run often.

    Not for use from two threads at once.

    Args:
        threads: the calling thread and this many less one of OpenMP's.
        kept: it will run often; then its times tell whether the team is disturbed.
        nodes: most tensors that it may have, inputs and weights included.
    """

    def __init__(self, ggml: Ggml, threads: int, kept: bool = False, nodes: int = 48) -> None:
        self._ggml = ggml
        self._kept_long = kept
        self._threads = threads
        self._most = nodes
        self._memory = np.empty(ggml.context_bytes(nodes), np.uint8)
        self._context = ggml.init(_InitParams(self._memory.size, self._memory.ctypes.data, True))
        if not self._context:
            raise BackendError(
                "ggml has no context left: more than 64 graphs are being built at once"
            )
        self._kept: list[Any] = []
        self._rounded: list[torch.Tensor] = []
        """Activations that products round to integers."""
        self._watched: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        """All memory of these, by its address, and as many small factors: their product is the
        quickest look at it.
        """
        self.spoiled = False
        """Whether the last run rounded a NaN or an infinity; the outputs that depend on it are
        meaningless then.
        """
        self._nodes = 0
        self._first: Node | None = None
        """The index of the only matrix."""
        self._graph = 0
        self._alone: _Plan | None = None
        self._together: _Plan | None = None
        self._alone_runs = 0
        self._alone_ns = 1 << 62

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        """A buffer that the caller fills: float32, or int32 for ids."""
        made = buffer(*shape, dtype=dtype)
        return self._own(self._tensor(_F32 if dtype == torch.float32 else _I32, shape), shape, made)

    def weight(self, stored: QuantizedMatrix) -> Node:
        """Stored bytes, read where they lie.

        Raises:
            BackendError: a type that was not tried, or bytes that do not fit the shape.
        """
        check_stored(stored)
        pointer = self._tensor(int(GGMLQuantizationType[stored.type_name]), stored.shape)
        self._point(pointer, stored.data.ctypes.data)
        self._kept.append(stored)
        return Node(pointer, stored.shape, None, stored.type_name)

    def place(self, memory: torch.Tensor) -> Node:
        """A tensor in memory of the caller's, float32 and contiguous; what writes there must be an
        earlier output.
        """
        assert (
            memory.dtype == torch.float32 and memory.is_contiguous() and memory.device.type == "cpu"
        )
        return self._own(self._tensor(_F32, memory.shape), tuple(memory.shape), memory)

    def constant(self, values: torch.Tensor) -> Node:
        """A vector [M] of the model's own as [1, M] float32; a float32 one is read where
        it lies.
        """
        return self.place(values.detach().float()[None])

    def pointer(self, node: Node) -> ctypes.c_uint64:
        """Where a tensor's data pointer is kept: set its `value` to let the next run read other
        bytes.
        """
        return ctypes.c_uint64.from_address(node.pointer + self._ggml.data_offset)

    def matmul(
        self, weight: Node, x: Node, out: torch.Tensor | None = None, indexed: bool | None = None
    ) -> Node:
        """[..., T, N] from weight [..., N, M] and x [..., T, M]; into `out` where it is given.

        Args:
            indexed: of a single matrix and row: through `matmul_id`; None for the quicker way.

        Raises:
            BackendError: shapes that do not fit.
        """
        batch = weight.shape[:-2]
        _need(
            weight.shape[-1] == x.shape[-1] and batch in ((), x.shape[:-2]), "a product", weight, x
        )
        self._watch(weight, x)
        shape = (*x.shape[:-1], weight.shape[-2])
        if x.shape == (1, weight.shape[-1]) and (
            self.indexed(weight) if indexed is None else indexed
        ):
            if self._first is None:
                self._first = self.input(1, 1, dtype=torch.int32)
                self._first.value.zero_()
            pointer = self._ggml.matmul_id(
                self._context, weight.pointer, x.pointer, self._first.pointer
            )
        else:
            pointer = self._ggml.matmul(self._context, weight.pointer, x.pointer)
        return self._own(pointer, shape, buffer(*shape) if out is None else out)

    def indexed(self, weight: Node) -> bool:
        """Whether `matmul_id` is the way to multiply one row by matrices of this type."""
        return self._ggml.pace(weight.type_name, self._threads).indexed

    def matmul_id(self, weights: Node, x: Node, ids: Node, out: torch.Tensor | None = None) -> Node:
        """[T, K, N] from weights [E, N, M], x [T, 1 or K, M] and ids [T, K] int32; into `out` where
        it is given.

        Ids must be in range. Raises: BackendError: shapes that do not fit.
        """
        fits = len(weights.shape) == len(x.shape) == 3 and weights.shape[-1] == x.shape[-1]
        _need(
            fits and x.shape[0] == ids.shape[0] and x.shape[1] in (1, ids.shape[1]),
            "a product",
            weights,
            x,
            ids,
        )
        self._watch(weights, x)
        shape = (*ids.shape, weights.shape[-2])
        pointer = self._ggml.matmul_id(self._context, weights.pointer, x.pointer, ids.pointer)
        return self._own(pointer, shape, buffer(*shape) if out is None else out)

    def rows(self, weight: Node, ids: Node) -> Node:
        """[T, M] float32: rows of weight [N, M] for ids [T] int32, which must be in range. Raises:
        BackendError.
        """
        _need(
            ids.value.dtype == torch.int32 and len(weight.shape) == 2 and len(ids.shape) == 1,
            "rows",
            weight,
            ids,
        )
        shape = (*ids.shape, weight.shape[-1])
        return self._own(
            self._ggml.get_rows(self._context, weight.pointer, ids.pointer), shape, buffer(*shape)
        )

    def silu_mul(self, gate: Node, up: Node) -> Node:
        """silu(gate) * up, in gate's buffer. Raises: BackendError: of different shapes."""
        _need(gate.shape == up.shape, "a gated product", gate, up)
        first = self._ggml.silu(self._context, gate.pointer)
        self._point(first, gate.value.data_ptr())
        return self._own(self._ggml.mul(self._context, first, up.pointer), gate.shape, gate.value)

    def add(self, x: Node, y: Node) -> Node:
        """x + y, in x's buffer, for x [..., M] and y [..., M] or [1, M]. Raises: BackendError:
        other shapes.
        """
        _need(y.shape in (x.shape, (1, x.shape[-1])), "a sum", x, y)
        return self._own(self._ggml.add(self._context, x.pointer, y.pointer), x.shape, x.value)

    def view(self, node: Node, part: torch.Tensor) -> Node:
        """A part of a node's buffer, given as torch's view of it: up to three dimensions, the last
        one dense.
        """
        whole = part[(None,) * (3 - part.ndim)]
        outer, middle, inner = (4 * stride for stride in whole.stride())
        assert inner == 4 and part.dtype == torch.float32
        offset = part.data_ptr() - node.value.data_ptr()
        pointer = self._ggml.view(
            self._context, node.pointer, *reversed(whole.shape), middle, outer, offset
        )
        return self._own(pointer, tuple(part.shape), part)

    def rms_norm(self, x: Node, weight: Node, eps: float, out: torch.Tensor | None = None) -> Node:
        """x / rms(x) * weight, [..., M] for a weight [1, M]; into `out` where it is given.

        Raises:
            BackendError: shapes that do not fit, or an epsilon for which `norm_epsilon_fits` is
                false.
        """
        _need(weight.shape == (1, x.shape[-1]), "a norm", weight, x)
        if not norm_epsilon_fits(eps):
            raise BackendError(
                f"ggml's norm needs a finite epsilon above 0 in float32, found {eps}"
            )
        norm = self._ggml.rms_norm(self._context, x.pointer, eps)
        out = buffer(*x.shape) if out is None else out
        self._point(norm, out.data_ptr())
        return self._own(self._ggml.mul(self._context, norm, weight.pointer), x.shape, out)

    def finish(self, *outputs: Node) -> None:
        """Close the graph; nothing can be added after. Outputs are computed in this order, one
        after the other.
        """
        ggml = self._ggml
        self._graph = ggml.new_graph(self._context, self._most, False)
        for output in outputs:
            ggml.expand(self._graph, output.pointer)
        self._alone = self._planned(1)
        self._together = self._planned(self._threads) if self._threads > 1 else None
        # The structures lie in our own memory: giving the context back only frees its place among
        # ggml's 64.
        self._free()

    def run(self) -> None:
        """Compute every output; look at `spoiled` after it. Mutates: the nodes' buffers. Raises:
        BackendError.
        """
        team, plan = self._ggml.team, self._together
        # A graph that is kept begins with one thread, to know what that takes.
        alone = plan is None or not team.together or (self._kept_long and self._alone_runs < 2)
        started = perf_counter_ns()
        status = self._ggml.compute(self._graph, ctypes.byref(self._alone if alone else plan))  # type: ignore[arg-type]
        took_ns = perf_counter_ns() - started
        if status:
            raise BackendError(f"ggml stopped with status {status}")
        if alone:
            self._alone_runs += 1
            self._alone_ns = min(self._alone_ns, took_ns)
            team.ran_alone()
        elif self._kept_long:
            team.ran_together(took_ns, self._alone_ns)
        self.spoiled = False
        for values, small in self._watched.values():
            if not math.isfinite(values.dot(small)):
                self.spoiled = True

    def spread_nan(self, rows: int, outputs: Sequence[Node]) -> None:
        """Make rows of outputs NaN, as float32 arithmetic does, where a product met a NaN or an
        infinity.

        Args:
            rows: how many the graph computes; dimension -2 of activations and outputs where it is
                more than one.
        """
        if rows == 1:
            for output in outputs:
                output.value.fill_(math.nan)
            return
        bad = torch.zeros(rows, dtype=torch.bool, device="cpu")
        for x in self._rounded:
            bad |= ~x.isfinite().all(-1).view(-1, rows).all(0)
        for output in outputs:
            output.value[..., bad, :] = math.nan

    def _watch(self, weight: Node, x: Node) -> None:
        """Look at x after every run, if products with this weight round it."""
        if weight.type_name in _FLOATS:
            return
        self._rounded.append(x.value)
        # Views share their buffer's memory, all of which has been written when a run ends.
        memory = x.value.untyped_storage()
        if memory.data_ptr() not in self._watched:
            values = torch.empty(0, dtype=torch.float32, device="cpu").set_(memory)
            self._watched[memory.data_ptr()] = values.numpy(), _small(values.numel())

    def _planned(self, threads: int) -> _Plan:
        plan: _Plan = self._ggml.plan(self._graph, threads)
        work = np.empty(max(1, plan.work_size), np.uint8)
        plan.work_data = work.ctypes.data
        self._kept.append(work)
        return plan

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._free()

    def _free(self) -> None:
        # First forgotten: an interrupt between the two loses one place, where it would otherwise be
        # freed twice.
        context, self._context = self._context, None
        self._ggml.free(context)

    def _tensor(self, kind: int, shape: Sequence[int]) -> int:
        sizes = (_Int64 * len(shape))(*reversed(shape))
        return int(self._ggml.new_tensor(self._context, kind, len(shape), sizes))

    def _own(self, pointer: int, shape: tuple[int, ...], memory: torch.Tensor) -> Node:
        self._point(pointer, memory.data_ptr())
        self._kept.append(memory)
        return Node(pointer, shape, memory)

    def _point(self, pointer: int, address: int) -> None:
        self._nodes += 1
        assert self._nodes <= self._most, f"a graph of {self._most} nodes has one more"
        ctypes.c_uint64.from_address(pointer + self._ggml.data_offset).value = address


def _small(count: int) -> NDArray[np.float32]:
    """Factors with which no sum of products overflows; those for one token are shared, so that they
    stay in a cache.
    """
    return _SMALL[:count] if count <= len(_SMALL) else np.full(count, _SMALL[0])


def _measured(ggml: Ggml, type_name: str, threads: int) -> Pace:
    """The matrix is larger than most last-level caches: which way is the quicker one may differ
    inside of them.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    columns = 4096
    rows = (64 << 20) // (columns // block * size)
    stored = QuantizedMatrix(
        np.ones(rows * columns // block * size, np.uint8), type_name, (rows, columns)
    )
    graphs = []
    for indexed in (False, True):
        graph = Graph(ggml, threads)
        x = graph.input(1, columns)
        graph.finish(graph.matmul(graph.weight(stored), x, indexed=indexed))
        x.value.fill_(1.0)
        graphs.append(graph)
    fastest = [1 << 62] * 2
    for _ in range(7):
        for index, graph in enumerate(graphs):
            started = perf_counter_ns()
            graph.run()
            fastest[index] = min(fastest[index], perf_counter_ns() - started)
    indexed = fastest[1] < _LEVEL * fastest[0]
    return Pace(indexed, fastest[indexed] / (rows * columns))


def check_stored(stored: QuantizedMatrix) -> None:
    """Raises: BackendError: a type that was not tried, or bytes that do not fit the shape."""
    if stored.type_name not in TYPES:
        raise BackendError(
            f"no ggml kernel for type {stored.type_name}; there is for {', '.join(sorted(TYPES))}"
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type_name]]
    wanted = int(np.prod(stored.shape)) // block * block_bytes
    if stored.shape[-1] % block:
        raise BackendError(
            f"{stored.type_name}: rows of {stored.shape[-1]} values are no whole blocks of {block}"
        )
    if stored.data.size != wanted or not stored.data.flags.c_contiguous:
        raise BackendError(
            f"a matrix {stored.shape} in {stored.type_name} has {wanted} contiguous bytes, found "
            f"{stored.data.size}"
        )


def norm_epsilon_fits(eps: float) -> bool:
    """Whether ggml's norm takes this epsilon: it ends the process on any that is not above 0 in
    float32.
    """
    return 0 < ctypes.c_float(eps).value < math.inf


def _need(fits: bool, what: str, *nodes: Node) -> None:
    if not fits:
        shapes = " and ".join(str(list(node.shape)) for node in nodes)
        raise BackendError(
            f"ggml cannot compute {what} of {shapes}: the shapes do not fit together"
        )


def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory that calls of every mode may write to: what inference mode makes can be changed there
    alone.

    On the CPU whatever the default device is: operators are built while that is `meta`.
    """
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")


def _function(symbol: Any, result: Any, *arguments: Any) -> Any:
    symbol.restype = result
    symbol.argtypes = arguments
    return symbol
