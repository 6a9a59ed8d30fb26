"""The functions of the ggml library that kt-kernel carries, through ctypes.

kt-kernel's own entry points are MoE layers on a pool of spinning workers. Its extension module
also exports the ggml library that these are built on.

ggml ends the process on what it does not know, so the library's version and its structures are
checked here, types and shapes in `ggml_graph`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from typing import Any

import numpy as np

from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.extras import KERNELS

CHECKED_VERSIONS = (KERNELS.version,)
"""kt-kernel releases whose ggml has the structures declared below; others are refused."""

F32, I32 = 0, 26
"""ggml's numbers of the types that buffers have."""

_Pointer = ctypes.c_void_p
_Int64 = ctypes.c_int64
_Size = ctypes.c_size_t


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", _Size),
        ("mem_buffer", _Pointer),
        ("no_alloc", ctypes.c_bool),
    ]


class Plan(ctypes.Structure):
    """How a graph is computed: its threads and their working memory."""

    work: Any
    """The owner of `work_data`, so that it lives as long as the plan."""

    _fields_ = [
        ("work_size", _Size),
        ("work_data", _Pointer),
        ("n_threads", ctypes.c_int),
        ("abort_callback", _Pointer),
        ("abort_callback_data", _Pointer),
    ]


class TypeTraits(ctypes.Structure):
    """What ggml says of a type."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int),
        ("block_bytes", _Size),
        ("quantised", ctypes.c_bool),
        ("to_float", _Pointer),
        ("from_float", _Pointer),
        ("from_float_reference", _Pointer),
        ("dot", _Pointer),
        ("dot_type", ctypes.c_int),
        ("dot_rows", _Int64),
    ]


class GgmlBinding:
    """ggml's functions with their C types; each is named as in ggml, without the prefix.

    Making one loads kt-kernel.

    Raises:
        BackendError: kt-kernel is missing, of a release that was not checked, or exports no ggml.
    """

    def __init__(self) -> None:
        kernel = import_kernel()
        version = _installed()
        if version not in CHECKED_VERSIONS:
            raise BackendError(
                f"kt-kernel {version}: its ggml was not checked, only that of "
                f"{', '.join(CHECKED_VERSIONS)}: {KERNELS.remedy()}"
            )
        path = str(kernel.__file__)
        try:
            # Only the computation is worth giving up the GIL for.
            self._declare(ctypes.PyDLL(path))
            self._declare_compute(ctypes.CDLL(path))
        except AttributeError as error:
            raise BackendError(f"kt-kernel {version} does not export ggml: {error}") from error
        self.data_offset = self._find_data()
        self.sizes_offset = self._find_sizes()

    def _declare(self, library: ctypes.PyDLL) -> None:
        """Raises: AttributeError: a function is not exported."""
        tensor = graph = context = _Pointer
        self._init = _function(library.ggml_init, _Pointer, _InitParams)
        self.free = _function(library.ggml_free, None, context)
        self._new_tensor = _function(
            library.ggml_new_tensor,
            tensor,
            context,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.POINTER(_Int64),
        )
        self._get_data = _function(library.ggml_get_data, _Pointer, tensor)
        self._tensor_overhead = _function(library.ggml_tensor_overhead, _Size)
        self._graph_overhead = _function(
            library.ggml_graph_overhead_custom, _Size, _Size, ctypes.c_bool
        )

        unary = (tensor, context, tensor)
        binary = (tensor, context, tensor, tensor)
        self.matmul = _function(library.ggml_mul_mat, *binary)
        self.matmul_id = _function(library.ggml_mul_mat_id, *binary, tensor)
        self.get_rows = _function(library.ggml_get_rows, *binary)
        self.silu = _function(library.ggml_silu_inplace, *unary)
        self.mul = _function(library.ggml_mul_inplace, *binary)
        self.add = _function(library.ggml_add_inplace, *binary)
        self.rms_norm = _function(library.ggml_rms_norm, *unary, ctypes.c_float)
        sizes_strides_offset = (*[_Int64] * 3, *[_Size] * 3)
        self.view = _function(library.ggml_view_3d, *unary, *sizes_strides_offset)

        self.type_traits = _function(
            library.ggml_internal_get_type_traits, TypeTraits, ctypes.c_int
        )

        self.new_graph = _function(
            library.ggml_new_graph_custom, graph, context, _Size, ctypes.c_bool
        )
        self.expand = _function(library.ggml_build_forward_expand, None, graph, tensor)
        self.plan = _function(library.ggml_graph_plan, Plan, graph, ctypes.c_int)

    def _declare_compute(self, library: ctypes.CDLL) -> None:
        """Raises: AttributeError: the function is not exported."""
        self.compute = _function(
            library.ggml_graph_compute, ctypes.c_int, _Pointer, ctypes.POINTER(Plan)
        )

    def new_context(self, memory: np.ndarray[Any, Any], allocate: bool = False) -> int | None:
        """A context whose structures lie in `memory`; None where ggml has no place left.

        Args:
            allocate: whether tensors' data lies there too.
        """
        context: int | None = self._init(_InitParams(memory.size, memory.ctypes.data, not allocate))
        return context

    def new_tensor(self, context: int | None, kind: int, shape: tuple[int, ...]) -> int:
        """A tensor of ggml type number `kind`; the shape is in torch's order of dimensions."""
        innermost_first = (_Int64 * len(shape))(*reversed(shape))
        return int(self._new_tensor(context, kind, len(shape), innermost_first))

    def context_bytes(self, nodes: int) -> int:
        """Memory for the structures of a graph of so many tensors."""
        tensor_bytes = self._tensor_overhead() + 64
        graph_bytes = self._graph_overhead(nodes, False)
        # An operation may make a view beside its result, hence twice the tensors.
        return int(2 * nodes * tensor_bytes + graph_bytes + 1024)

    def _find_data(self) -> int:
        """Where a tensor keeps its data pointer, found by looking for one that is known."""
        memory = np.zeros(1 << 16, np.uint8)
        context = self.new_context(memory, allocate=True)
        tensor = self.new_tensor(context, F32, (8,))
        wanted = self._get_data(tensor)
        words = (ctypes.c_uint64 * 40).from_address(tensor)
        found = [8 * index for index, word in enumerate(words) if word == wanted]
        self.free(context)
        if len(found) != 1:
            raise BackendError("ggml in kt-kernel keeps its tensors in an unknown way")
        return found[0]

    def _find_sizes(self) -> int:
        """Where a tensor keeps its four sizes, innermost first, and then its four strides."""
        memory = np.zeros(1 << 16, np.uint8)
        context = self.new_context(memory)
        tensor = self.new_tensor(context, F32, (3, 5, 7, 11))
        words = list((_Int64 * 40).from_address(tensor))
        self.free(context)
        wanted = [11, 7, 5, 3, 4, 44, 308, 1540]
        found = [at for at in range(32) if words[at : at + 8] == wanted]
        if len(found) != 1:
            raise BackendError("ggml in kt-kernel keeps its tensors in an unknown way")
        return 8 * found[0]


@functools.cache
def _installed() -> str:
    """kt-kernel's release. Loading a model asks hundreds of times, and parsing takes 0.4 ms."""
    return importlib.metadata.version("kt-kernel")


def _function(symbol: Any, result: Any, *arguments: Any) -> Any:
    symbol.restype = result
    symbol.argtypes = arguments
    return symbol
