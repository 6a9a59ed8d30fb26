"""Many tokens' experts by tiles: one operation for each step, over all experts that have rows.

chosen experts [T, K]    5 3 | 0 5 | 0 3      T = 3, K = 2
rows, sorted             0: tokens 1 2    3: tokens 0 2    5: tokens 0 1
blocks of 16 rows        0                1                2
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.tensor import buffer, bytes_of_row
from hybrimoe_plugin.compute.cpu.ggml_stored import StoredExperts
from hybrimoe_plugin.compute.cpu.ggml_union import UnionRows
from hybrimoe_plugin.compute.cpu.native.kernels import (
    PANEL,
    TILE_ROWS,
    Kernels,
    operations,
)
from hybrimoe_plugin.compute.cpu.native.structures import (
    GraphOf,
    Operation,
    Product,
    Products,
    Rows,
    Tiling,
    WeightedSum,
)

Integers = NDArray[np.int64]

_PRODUCT = np.dtype([(name, np.int64) for name, *_ in Product._fields_])


class _Blocks(NamedTuple):
    """Blocks of up to 16 rows, none of which has rows of two experts."""

    firsts: Integers
    """[B]: each one's first row."""
    counts: Integers
    """[B]: its rows."""
    of_expert: Integers
    """[U]: each expert's first block."""

    @classmethod
    def of(cls, loads: Integers) -> _Blocks:
        """From the experts' numbers of rows [U]."""
        blocks = -(-loads // TILE_ROWS)
        of_expert = np.cumsum(blocks) - blocks
        starts = np.cumsum(loads) - loads
        number = np.arange(blocks.sum()) - np.repeat(of_expert, blocks)
        firsts = np.repeat(starts, blocks) + TILE_ROWS * number
        ends = np.repeat(starts + loads, blocks)
        return cls(firsts, np.minimum(ends - firsts, TILE_ROWS), of_expert)


def can_tile(kernels: Kernels | None, stored: StoredExperts) -> bool:
    """Whether a layer's experts can be computed by tiles."""
    if kernels is None:
        return False
    parts = stored.gate, stored.up, stored.down
    fit = all(kernels.can_tile(part.type_name, part.shape[-1]) for part in parts)
    return fit and all(stored.ggml.forms(part.type_name).lookup for part in parts)


def by_tiles(
    kernels: Kernels,
    stored: StoredExperts,
    addresses: Integers,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H] of hidden's dtype: the weighted sum over each token's experts.

    Args:
        addresses: [3, E], of each expert's matrices.
        hidden: [T, H].
        ids: [T, K]; must be in range.
        weights: [T, K].
        kept: [T, K] bool: choices that count; all where it is not given.
    """
    rows = UnionRows.of(ids, kept)
    if not len(rows.choices):
        return torch.zeros_like(hidden)
    call = _Call(kernels, stored, addresses, hidden, rows, ids)
    if stored.is_swiglu:
        call.first()
        call.silu()
        call.second()
    else:
        call.first()
        call.run()
        experts = ids.reshape(-1)[torch.from_numpy(rows.choices)]
        stored.activate(call.gates, call.ups, experts)
        call.second()
    if stored.biases is not None:
        call.run()
        stored.add_down_bias(call.outputs, ids.reshape(-1)[torch.from_numpy(rows.choices)])
    return call.sums(weights, kept).to(hidden.dtype)


class _Call:
    """The operations of one call and their memory."""

    def __init__(
        self,
        kernels: Kernels,
        stored: StoredExperts,
        addresses: Integers,
        hidden: torch.Tensor,
        rows: UnionRows,
        ids: torch.Tensor,
    ) -> None:
        self._kernels = kernels
        self._stored = stored
        self._addresses = addresses[:, rows.experts]
        self._rows = rows
        self._shape = ids.shape
        self._x = hidden.detach().float().contiguous()
        self._tokens = np.ascontiguousarray(rows.choices // ids.shape[1])
        self._blocks = _Blocks.of(rows.loads)
        count = len(rows.choices)
        _, inner, width = stored.gate.shape
        self.gates = buffer(count, inner)
        self.ups = buffer(count, inner)
        self.outputs = buffer(count, width)
        self._steps: list[Operation] = []
        self._kept: list[object] = []
        """Memory whose addresses the operations hold."""

    def first(self) -> None:
        """Gates and ups."""
        x = self._tiles(self._x, self._tokens)
        gate = self._products(0, x, self.gates)
        up = self._products(1, x, self.ups)
        self._multiply([gate, up])

    def silu(self) -> None:
        """gates = silu(gates) * ups"""
        count, inner = self.gates.shape
        gates = self.gates.data_ptr()
        data = Rows(gates, gates, self.ups.data_ptr(), count, inner, inner, inner, inner, 0.0)
        self._add(operations.silu_multiply, count, data)

    def second(self) -> None:
        """Outputs."""
        x = self._tiles(self.gates, None)
        self._multiply([self._products(2, x, self.outputs)])

    def sums(self, weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """[T, H] float32."""
        tokens, top_k = self._shape
        width = self.outputs.shape[1]
        factors = weights.detach().float().contiguous()
        places = np.zeros(tokens * top_k, np.int64)
        places[self._rows.choices] = np.arange(len(self._rows.choices))
        out = buffer(tokens, width)
        if kept is not None:
            # A row that does not count may hold a NaN, so its factor is no 0.
            return self._kept_sums(factors, places, kept)
        data = WeightedSum(
            factors.data_ptr(),
            self.outputs.data_ptr(),
            places.ctypes.data,
            out.data_ptr(),
            top_k,
            width,
        )
        self._kept += [factors, places]
        self._add(operations.weighted_sum, tokens, data)
        self.run()
        return out

    def _kept_sums(
        self, factors: torch.Tensor, places: Integers, kept: torch.Tensor
    ) -> torch.Tensor:
        self.run()
        by_choice = self.outputs[torch.from_numpy(places)].view(*self._shape, -1)
        by_choice = by_choice.masked_fill(~kept[..., None], 0)
        return torch.bmm(factors[:, None], by_choice)[:, 0]

    def run(self) -> None:
        """Compute what was added since the last run."""
        steps = (Operation * len(self._steps))(*self._steps)
        graph = GraphOf(ctypes.addressof(steps), len(steps))
        self._kernels.run((graph,), self._stored.threads)
        self._steps.clear()

    def _tiles(self, x: torch.Tensor, places: Integers | None) -> torch.Tensor:
        """[blocks, 16 M] bfloat16: the rows of x, or those at these places of it."""
        blocks = self._blocks
        rows, columns = x.shape
        count = len(blocks.firsts)
        out = buffer(count, TILE_ROWS * columns, dtype=torch.bfloat16)
        data = Tiling(
            x.data_ptr(),
            columns,
            None if places is None else places.ctypes.data,
            blocks.firsts.ctypes.data,
            blocks.counts.ctypes.data,
            out.data_ptr(),
            rows,
            columns,
        )
        self._kept.append(out)
        self._add(operations.to_tiles, count, data)
        return out

    def _products(self, matrix: int, x: torch.Tensor, out: torch.Tensor) -> NDArray[np.void]:
        """One product for each expert."""
        part = (self._stored.gate, self._stored.up, self._stored.down)[matrix]
        _, count, columns = part.shape
        loads = self._rows.loads
        products = np.zeros(len(loads), _PRODUCT)
        products["kind"] = ctypes.addressof(self._kernels.of(part.type_name).kind)
        products["weights"] = self._addresses[matrix]
        products["weights_stride"] = bytes_of_row(part.type_name, columns)
        x_stride = x.stride(0) * x.element_size()
        products["x"] = x.data_ptr() + self._blocks.of_expert * x_stride
        products["x_stride"] = x_stride
        starts = np.cumsum(loads) - loads
        products["out"] = out.data_ptr() + starts * out.stride(0) * out.element_size()
        products["out_stride"] = out.stride(0)
        products["rows"] = loads
        products["count"] = count
        products["columns"] = columns
        products["chunk_rows"] = PANEL
        return products

    def _multiply(self, groups: list[NDArray[np.void]]) -> None:
        products = np.concatenate(groups)
        chunks = -(-products["count"] // PANEL)
        products["first_chunk"] = np.cumsum(chunks) - chunks
        data = Products(products.ctypes.data, len(products))
        self._kept.append(products)
        self._add(operations.tile_products, int(chunks.sum()), data)

    def _add(self, run: int, chunks: int, data: ctypes.Structure) -> None:
        self._kept.append(data)
        self._steps.append(Operation(run, chunks, ctypes.addressof(data)))
