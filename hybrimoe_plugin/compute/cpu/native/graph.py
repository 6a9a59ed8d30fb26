"""Graphs of compiled operations, with the interface of ggml's `Graph`.

    matmul(gate, x), matmul(up, x), silu_mul, matmul(down, inner)

    operation     convert x | gate and up | silu * up | convert inner | down
    chunks            1     |    24       |     1     |       1       |  12

Products that follow each other and do not depend on each other are one operation. Activations are
converted once for all products that take them in the same type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.runtime import GraphRuntime
from hybrimoe_plugin.compute.cpu.ggml.tensor import (
    GraphTensor,
    buffer,
    bytes_of_row,
    check_stored,
    norm_epsilon_fits,
    require,
    require_form,
)
from hybrimoe_plugin.compute.cpu.native.kernels import (
    TILE_DEPTH,
    TILE_ROWS,
    Kernels,
    TypeKernels,
    operations,
)
from hybrimoe_plugin.compute.cpu.native.structures import (
    Attention,
    Conversion,
    LookUp,
    Operation,
    Pointing,
    Product,
    Products,
    Rotation,
    Rows,
    Tiling,
    WeightedSum,
)
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_ROWS_FOR_TILES = 4
"""Rows of activations from which tiles are faster than row by row."""
_CHUNK_BYTES = 64 << 10
_CHUNKS_PER_THREAD = 4
_LEAST_BLOCK, _MOST_BLOCK, _BLOCK_BYTES = 16, 256, 64 << 10
"""Tokens of the cache of a chunk, whose keys are to stay in a core's cache."""
_PANEL = 32
"""Rows of weights of a chunk by tiles."""


class _Step(NamedTuple):
    """An operation to be."""

    run: int
    chunks: int
    data: ctypes.Structure


class _ProductsStep:
    """Products that are going to be one operation."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.products: list[Product] = []
        self.chunks = 0
        self.written: set[int] = set()
        """Addresses of the storages that they write."""

    def add(self, product: Product, chunks: int, out: torch.Tensor) -> None:
        product.first_chunk = self.chunks
        self.products.append(product)
        self.chunks += chunks
        self.written.add(_storage(out))


class Rotating(NamedTuple):
    """A rotary embedding: result[i] = x[first[i]] * by_first[i] + x[second[i]] * by_second[i]."""

    first: torch.Tensor
    """[D] int64, as `second`."""
    second: torch.Tensor
    by_first: torch.Tensor
    """[D] float32, as `by_second`; of the running step's position."""
    by_second: torch.Tensor


class AttendedCache:
    """The cache that a graph's attention reads, and writes the new entry to."""

    def __init__(self, data: Attention, step: int) -> None:
        self._data = data
        self.step = step
        self.operation: Any = None
        """The one whose chunks are blocks of tokens; known once the graph is finished."""
        width = max(data.width, data.value_width)
        block = _BLOCK_BYTES // (4 * width)
        self._block = data.block = max(_LEAST_BLOCK, min(block, _MOST_BLOCK))
        self._blocks = 0
        self._parts: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None

    def set(self, keys: torch.Tensor, values: torch.Tensor, held: int) -> None:
        """Name it for the next runs.

        Args:
            keys: [1, key heads, capacity, D] float32, of which so many are held; there is room for
                one more.
            values: the same with W; with no values where those of keys are read.
        """
        data = self._data
        if keys is not self._keys:
            self._keys = None
            values = values if values.shape[3] else keys
            data.keys, data.values = keys.data_ptr(), values.data_ptr()
            data.key_head_stride, data.key_stride = keys.stride(1), keys.stride(2)
            data.value_head_stride, data.value_stride = values.stride(1), values.stride(2)
            self._keys = keys
        blocks = held // self._block + 1
        if blocks > self._blocks:
            heads = data.key_heads * data.group
            self._parts = buffer(2 * blocks, heads, data.value_width + 2)
            data.parts = self._parts.data_ptr()
            self._blocks = 2 * blocks
        data.held = held
        self.operation.chunks = blocks * data.key_heads


class NativeGraph:
    """Operations on fixed buffers, built once and run often.

    Args:
        threads: that work on it, the caller's among them.

    Attributes:
        spoiled: always False. What depends on a NaN or an infinity is NaN by itself.
    """

    spoiled = False

    def __init__(self, ggml: GraphRuntime, kernels: Kernels, threads: int) -> None:
        self._ggml = ggml
        self._kernels = kernels
        self._threads = threads
        self._steps: list[_Step | _ProductsStep] = []
        self._converted: dict[tuple[Any, ...], torch.Tensor] = {}
        """Activations as products take them, by where they lie and how they were converted."""
        self._referenced: list[Any] = []
        """Memory whose addresses the operations hold."""
        self._pointings: list[tuple[Pointing, _ProductsStep, int]] = []
        """What sets the weights of products, and which of a step's they are."""
        self._caches: list[AttendedCache] = []
        self._operations: Any = None

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> GraphTensor:
        """A buffer that the caller fills: float32, or int32 for ids."""
        return self._tensor(buffer(*shape, dtype=dtype))

    def weight(self, stored: QuantizedMatrix) -> GraphTensor:
        """Stored bytes, read in place.

        Raises:
            BackendError: a type that was not tried, or bytes that do not fit the shape.
        """
        check_stored(stored)
        self._referenced.append(stored)
        return GraphTensor(0, stored.shape, None, stored.type_name, stored)

    def wrap(self, memory: torch.Tensor) -> GraphTensor:
        """A tensor in the caller's memory, float32 and contiguous."""
        assert memory.dtype == torch.float32
        assert memory.is_contiguous() and memory.device.type == "cpu"
        return self._tensor(memory)

    def wrap_ids(self, memory: torch.Tensor) -> GraphTensor:
        """The same for ids int32."""
        return self._tensor(memory)

    def constant(self, values: torch.Tensor) -> GraphTensor:
        """One of the model's own vectors [M] as [1, M] float32; not copied if it is float32."""
        return self.wrap(values.detach().float()[None])

    def view(self, tensor: GraphTensor, part: torch.Tensor) -> GraphTensor:
        """A part of a tensor's buffer, given as torch's view of it; the last dimension dense."""
        assert part.stride(-1) == 1 and part.dtype == torch.float32
        return self._tensor(part)

    def matmul(
        self,
        weight: GraphTensor,
        x: GraphTensor,
        out: torch.Tensor | None = None,
        indexed: bool | None = None,
    ) -> GraphTensor:
        """[..., T, N] from weight [..., N, M] and x [..., T, M].

        Args:
            out: where the result goes; by default into memory of its own.
            indexed: for ggml's graphs.

        Raises:
            BackendError: shapes that do not fit, or a type whose products are wrong here.
        """
        columns = weight.shape[-1]
        batch_fits = weight.shape[:-2] in ((), x.shape[:-2])
        require(columns == x.shape[-1] and batch_fits, "a product", weight, x)
        out = buffer(*x.shape[:-1], weight.shape[-2]) if out is None else out
        target = out.view(*x.shape[:-1], weight.shape[-2])
        kernels = self._kernels.of(weight.type_name)
        tiled = x.shape[-2] >= _ROWS_FOR_TILES and self._can_tile(weight)
        forms = self._ggml.forms(weight.type_name)
        right = forms.lookup if tiled else forms.indexed
        require_form(right or weight.stored is None, "products", weight)
        run = operations.tile_products if tiled else operations.row_products
        by_batch = x.value.view(x.shape) if x.value.is_contiguous() else x.value
        inputs = _three(by_batch)
        outputs = _three(target)
        converted = self._converted_rows(inputs, kernels, tiled)
        step = self._products_step(run, inputs)
        for index in range(len(inputs)):
            product, chunks = self._product(weight, index, converted, outputs[index], kernels, tiled)
            step.add(product, chunks, target)
        self._wrote(target)
        return self._tensor(target)

    def matmul_chosen(
        self,
        like: QuantizedMatrix,
        addresses: NDArray[np.int64],
        ids: GraphTensor,
        x: GraphTensor,
        out: torch.Tensor,
    ) -> GraphTensor:
        """[K, N]: each row of x [K, M], or the only one, times the matrix of its expert.

        Args:
            like: an expert's matrix [N, M].
            addresses: [E], of those of all experts, which the caller keeps.
            ids: [K] int32; must be in range when the graph runs.
            out: [K, N], where the result goes.
        """
        top_k = ids.shape[0]
        rows = x.value.expand(top_k, -1)
        weight = self.weight(like)
        for place in range(top_k):
            # One row each: a view of all would be a single product.
            row = self._tensor(rows[place : place + 1])
            self.matmul(weight, row, out[place : place + 1])
        step = self._steps[-1]
        assert isinstance(step, _ProductsStep)
        pointing = Pointing(ids.value.data_ptr(), addresses.ctypes.data, None, top_k)
        self._referenced.append(addresses)
        self._pointings.append((pointing, step, len(step.products) - top_k))
        self._steps.insert(len(self._steps) - 1, _Step(operations.point, 1, pointing))
        return self._tensor(out)

    def weighted_sum(self, values: GraphTensor, weights: GraphTensor) -> GraphTensor:
        """[1, W]: the sum of values [K, W] by weights [1, K]."""
        top_k, width = values.shape
        require(weights.shape == (1, top_k), "a weighted sum", values, weights)
        out = buffer(1, width)
        places = torch.arange(top_k, device="cpu")
        data = WeightedSum(
            weights.value.data_ptr(),
            values.value.data_ptr(),
            places.data_ptr(),
            out.data_ptr(),
            top_k,
            width,
        )
        self._referenced.append(places)
        self._add(operations.weighted_sum, 1, data, out)
        return self._tensor(out)

    def rotate(self, x: GraphTensor, rotation: Rotating, out: torch.Tensor | None) -> GraphTensor:
        """The rotary embedding of x [..., D], in memory of its own or in `out`."""
        inputs = _rows(x.value)
        out = buffer(*x.shape) if out is None else out
        outputs = _rows(out)
        data = Rotation(
            inputs.data_ptr(),
            outputs.data_ptr(),
            inputs.stride(0),
            outputs.stride(0),
            *(part.data_ptr() for part in rotation),
            inputs.shape[1],
        )
        self._referenced += [inputs, outputs, rotation]
        self._add(operations.rotate, len(inputs), data, out)
        return self._tensor(out)

    def attend(
        self,
        query: torch.Tensor,
        key: GraphTensor,
        value: GraphTensor | None,
        key_heads: int,
        value_width: int,
        scaling: float,
    ) -> tuple[GraphTensor, AttendedCache]:
        """Attention of one token over a cache that is named before each run: [heads, W].

        Args:
            query: [heads, D], those of a key head side by side.
            key: [key heads x D], the token's own.
            value: [key heads x W]; None where the first W values of keys are the values.
        """
        heads, width = query.shape
        out = buffer(heads, value_width)
        data = Attention(
            query=query.data_ptr(),
            key=key.value.data_ptr(),
            value=None if value is None else value.value.data_ptr(),
            key_heads=key_heads,
            group=heads // key_heads,
            width=width,
            value_width=value_width,
            out=out.data_ptr(),
            scaling=scaling,
        )
        self._referenced += [query, key, value]
        self._add(operations.append, 1, data, out)
        self._add(operations.attend_block, 1, data, out)
        cache = AttendedCache(data, len(self._steps) - 1)
        self._caches.append(cache)
        self._add(operations.merge_blocks, heads, data, out)
        return self._tensor(out), cache

    def rows(self, weight: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """[T, M] float32: rows of weight [N, M] for ids [T] int32, which must be in range.

        Raises:
            BackendError: shapes that do not fit, ids of another type, or a type that is
                dequantised wrongly.
        """
        fits = len(weight.shape) == 2 and len(ids.shape) == 1 and weight.stored is not None
        require(fits and ids.value.dtype == torch.int32, "rows", weight, ids)
        require_form(self._ggml.forms(weight.type_name).lookup, "rows", weight)
        out = buffer(*ids.shape, weight.shape[-1])
        kind = self._kernels.of(weight.type_name).kind
        data, stride = _weights(weight, 0)
        look_up = LookUp(
            ctypes.addressof(kind), data, stride, weight.shape[-1], ids.value.data_ptr(), out.data_ptr()
        )
        self._add(operations.look_up, len(out), look_up, out)
        return self._tensor(out)

    def silu_mul(self, gate: GraphTensor, up: GraphTensor) -> GraphTensor:
        """silu(gate) * up, in gate's buffer. Raises: BackendError: different shapes."""
        require(gate.shape == up.shape, "a gated product", gate, up)
        return self._by_row(operations.silu_multiply, gate, up, gate.value)

    def silu(self, x: GraphTensor) -> GraphTensor:
        """silu(x), in x's buffer."""
        return self._by_row(operations.silu, x, x, x.value)

    def multiply(self, x: GraphTensor, y: GraphTensor) -> GraphTensor:
        """x * y, in x's buffer. Raises: BackendError: different shapes."""
        require(x.shape == y.shape, "a product of each value", x, y)
        return self._by_row(operations.multiply, x, y, x.value)

    def add(self, x: GraphTensor, y: GraphTensor) -> GraphTensor:
        """x + y, in x's buffer, for x [..., M] and y [..., M] or [1, M].

        Raises:
            BackendError: other shapes.
        """
        require(y.shape in (x.shape, (1, x.shape[-1])), "a sum", x, y)
        return self._by_row(operations.add, x, y, x.value)

    def rms_norm(
        self, x: GraphTensor, weight: GraphTensor, eps: float, out: torch.Tensor | None = None
    ) -> GraphTensor:
        """x / rms(x) * weight, [..., M], for a weight [1, M].

        Args:
            out: where the result goes; by default into memory of its own.

        Raises:
            BackendError: shapes that do not fit, or an epsilon for which `norm_epsilon_fits` is
                false.
        """
        require(weight.shape == (1, x.shape[-1]), "a norm", weight, x)
        if not norm_epsilon_fits(eps):
            raise BackendError(f"a norm needs a finite epsilon above 0 in float32, found {eps}")
        out = buffer(*x.shape) if out is None else out
        return self._by_row(operations.rms_norm, x, weight, out, eps)

    def finish(self, *outputs: GraphTensor) -> None:
        """Close the graph: nothing can be added after."""
        made = (Operation * len(self._steps))()
        for operation, step in zip(made, self._steps, strict=True):
            if isinstance(step, _ProductsStep):
                products = (Product * len(step.products))(*step.products)
                data: Any = Products(ctypes.addressof(products), len(products))
                for pointing, its_step, first in self._pointings:
                    if its_step is step:
                        pointing.products = ctypes.addressof(products[first])
                self._referenced.append(products)
            else:
                data = step.data
            self._referenced.append(data)
            operation.run = step.run
            operation.chunks = step.chunks
            operation.data = ctypes.addressof(data)
        for cache in self._caches:
            cache.operation = made[cache.step]
        self._operations = made

    def run(self) -> None:
        """Compute every output. Mutates: the tensors' buffers."""
        assert self._operations is not None, "finish() comes first"
        status = self._kernels.run(self._operations, len(self._operations), self._threads)
        assert status == 0, "too many operations or chunks"

    def spread_nan(self, rows: int, outputs: Sequence[GraphTensor]) -> None:
        """Nothing to do: see `spoiled`."""

    def _can_tile(self, weight: GraphTensor) -> bool:
        return self._kernels.tiles and weight.shape[-1] % TILE_DEPTH == 0

    def _product(
        self,
        weight: GraphTensor,
        index: int,
        converted: torch.Tensor,
        out: torch.Tensor,
        kernels: TypeKernels,
        tiled: bool,
    ) -> tuple[Product, int]:
        """One matrix of a batch, and its number of chunks.

        Args:
            converted: [B, rows or blocks, bytes].
            out: [T, N].
        """
        data, stride = _weights(weight, index if len(weight.shape) == 3 else 0)
        count, columns = weight.shape[-2:]
        chunk_rows = _PANEL if tiled else self._chunk_rows(count, stride)
        x = converted[index]
        product = Product(
            ctypes.addressof(kernels.kind),
            data,
            stride,
            x.data_ptr(),
            x.stride(0) * x.element_size(),
            out.data_ptr(),
            out.stride(0),
            out.shape[0],
            count,
            columns,
            0,
            chunk_rows,
        )
        return product, -(-count // chunk_rows)

    def _chunk_rows(self, count: int, row_bytes: int) -> int:
        """Rows of weights of a chunk: few enough to share, many enough to read ahead."""
        by_size = max(1, _CHUNK_BYTES // row_bytes)
        shared = -(-count // (_CHUNKS_PER_THREAD * self._threads))
        return max(1, min(by_size, shared))

    def _converted_rows(
        self, x: torch.Tensor, kernels: TypeKernels, tiled: bool
    ) -> torch.Tensor:
        """x [B, T, M] as products take it: [B, T, bytes], or [B, T / 16, bytes] of tiles."""
        if not tiled and kernels.convert is None:
            return x
        how = "tiles" if tiled else kernels.convert
        key = x.data_ptr(), tuple(x.shape), x.stride(), how
        found = self._converted.get(key)
        if found is not None:
            return found
        batch, rows, columns = x.shape
        if tiled:
            blocks = -(-rows // TILE_ROWS)
            found = buffer(batch, blocks, TILE_ROWS * columns, dtype=torch.bfloat16)
        else:
            found = buffer(batch, rows, kernels.x_bytes(columns), dtype=torch.uint8)
        for part, out in zip(x, found, strict=True):
            step: ctypes.Structure
            if tiled:
                places = None, None, None
                step = Tiling(
                    part.data_ptr(), part.stride(0), *places, out.data_ptr(), rows, columns
                )
                run = operations.to_tiles
            else:
                step = Conversion(
                    kernels.convert,
                    part.data_ptr(),
                    part.stride(0),
                    out.data_ptr(),
                    out.stride(0),
                    rows,
                    columns,
                )
                run = operations.convert
            self._before_products(_Step(run, len(out), step), x)
        self._referenced += [found, x]
        self._converted[key] = found
        return found

    def _before_products(self, step: _Step, x: torch.Tensor) -> None:
        """Add a conversion, before the last products if these do not make what it reads."""
        last = self._steps[-1] if self._steps else None
        if isinstance(last, _ProductsStep) and _storage(x) not in last.written:
            self._steps.insert(len(self._steps) - 1, step)
        else:
            self._steps.append(step)

    def _products_step(self, run: int, x: torch.Tensor) -> _ProductsStep:
        """The operation that products of x can be part of."""
        last = self._steps[-1] if self._steps else None
        if isinstance(last, _ProductsStep) and last.run == run and _storage(x) not in last.written:
            return last
        step = _ProductsStep(run)
        self._steps.append(step)
        return step

    def _by_row(
        self, run: int, x: GraphTensor, y: GraphTensor, out: torch.Tensor, number: float = 0.0
    ) -> GraphTensor:
        """An operation on rows, whose second argument may be one row for all."""
        inputs, others, outputs = _rows(x.value), _rows(y.value), _rows(out)
        data = Rows(
            outputs.data_ptr(),
            inputs.data_ptr(),
            others.data_ptr(),
            len(inputs),
            inputs.shape[1],
            inputs.stride(0),
            others.stride(0) if len(others) == len(inputs) else 0,
            outputs.stride(0),
            number,
        )
        self._referenced += [inputs, others]
        self._add(run, len(inputs), data, out)
        return self._tensor(out)

    def _add(self, run: int, chunks: int, data: ctypes.Structure, out: torch.Tensor) -> None:
        self._steps.append(_Step(run, chunks, data))
        self._wrote(out)

    def _wrote(self, out: torch.Tensor) -> None:
        """Forget conversions of what is written anew."""
        self._referenced.append(out)
        storage = _storage(out)
        stale = [key for key in self._converted if key[0] == storage]
        for key in stale:
            del self._converted[key]

    def _tensor(self, memory: torch.Tensor) -> GraphTensor:
        self._referenced.append(memory)
        return GraphTensor(0, tuple(memory.shape), memory)


AnyGraph = Graph | NativeGraph


def _storage(memory: torch.Tensor) -> int:
    return memory.untyped_storage().data_ptr()


def _three(values: torch.Tensor) -> torch.Tensor:
    """[B, T, M], of B = 1 where there are two dimensions."""
    return values[None] if values.ndim == 2 else values


def _rows(values: torch.Tensor) -> torch.Tensor:
    """[rows, M]; a view."""
    return values.view(-1, values.shape[-1]) if values.ndim != 2 else values


def _weights(weight: GraphTensor, index: int) -> tuple[int, int]:
    """(address of a matrix of a stack, bytes from one of its rows to the next)."""
    columns = weight.shape[-1]
    if weight.stored is None:
        values = _three(weight.value)[index]
        return values.data_ptr(), 4 * values.stride(0)
    stored = weight.stored
    row = bytes_of_row(stored.type_name, columns)
    matrix = stored.stride or row * weight.shape[-2]
    return int(stored.data.ctypes.data) + index * matrix, row
