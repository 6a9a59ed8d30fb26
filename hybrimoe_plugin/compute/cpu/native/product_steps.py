"""Products in a graph: how they are cut into chunks, and activations brought into their types."""

from __future__ import annotations

import ctypes

import torch

from hybrimoe_plugin.compute.cpu.ggml.tensor import GraphTensor, buffer, bytes_of_row
from hybrimoe_plugin.compute.cpu.native.kernels import (
    PANEL,
    TILE_ROWS,
    TypeKernels,
    operations,
)
from hybrimoe_plugin.compute.cpu.native.steps import Step, Steps, storage_of
from hybrimoe_plugin.compute.cpu.native.structures import Conversion, Product, Tiling

_ROWS_FOR_TILES = 4
"""Rows of activations from which tiles are faster than row by row."""
_TILED_FOR_EXACT = 2.5
"""Multiply-adds by tiles that make up for one of many rows in a type of `EXACT`, which take thrice
the time that they take in ggml's graphs; those by tiles take a sixth.
"""


class ProductSteps(Steps):
    """Steps, products among them."""

    _exact = _tiled = 0
    """Multiply-adds of many rows, without and with tiles."""

    @property
    def slower_than_ggml(self) -> bool:
        """Whether ggml's graphs are faster, since most products of many rows are not by tiles."""
        return self._tiled < _TILED_FOR_EXACT * self._exact

    def _add_products(
        self, weight: GraphTensor, x: torch.Tensor, out: torch.Tensor, kernels: TypeKernels
    ) -> None:
        """out [..., T, N] from weight [..., N, M] and x [..., T, M], whose shapes fit."""
        tiled = self._takes_tiles(weight, x)
        if tiled:
            self._tiled += x.numel() * weight.shape[-2]
        elif x.shape[-2] >= _ROWS_FOR_TILES:
            self._exact += x.numel() * weight.shape[-2]
        run = operations.tile_products if tiled else operations.row_products
        inputs, outputs = _three(x), _three(out)
        converted = self._converted_rows(inputs, kernels, tiled)
        step = self._products_step(run, inputs)
        for index in range(len(inputs)):
            output = outputs[index]
            product = self._product(weight, index, converted, output, kernels, tiled)
            step.add(product, out)
        self._wrote(out)

    def _takes_tiles(self, weight: GraphTensor, x: torch.Tensor) -> bool:
        many = x.shape[-2] >= _ROWS_FOR_TILES
        return many and self._kernels.can_tile(weight.type_name, weight.shape[-1])

    def _product(
        self,
        weight: GraphTensor,
        index: int,
        converted: torch.Tensor,
        out: torch.Tensor,
        kernels: TypeKernels,
        tiled: bool,
    ) -> Product:
        """One matrix of a batch.

        Args:
            converted: [B, rows or blocks, bytes].
            out: [T, N].
        """
        data, stride = matrix_of(weight, index if len(weight.shape) == 3 else 0)
        count, columns = weight.shape[-2:]
        x = converted[index]
        return Product(
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
            PANEL if tiled else 0,
        )

    def _converted_rows(self, x: torch.Tensor, kernels: TypeKernels, tiled: bool) -> torch.Tensor:
        """x [B, T, M] as products take it: [B, T, bytes], or [B, T / 16, bytes] of tiles."""
        if not tiled and kernels.convert is None:
            return x
        how = "tiles" if tiled else kernels.convert
        key = storage_of(x), x.data_ptr(), tuple(x.shape), x.stride(), how
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
            self._before_products(Step(run, len(out), step), x)
        self._referenced += [found, x]
        self._converted[key] = found
        return found


def _three(values: torch.Tensor) -> torch.Tensor:
    """[B, T, M], of B = 1 where there are two dimensions."""
    return values[None] if values.ndim == 2 else values


def matrix_of(weight: GraphTensor, index: int) -> tuple[int, int]:
    """(address of a matrix of a stack, bytes from one of its rows to the next)."""
    columns = weight.shape[-1]
    if weight.stored is None:
        values = _three(weight.value)[index]
        return values.data_ptr(), 4 * values.stride(0)
    stored = weight.stored
    row = bytes_of_row(stored.type_name, columns)
    matrix = stored.stride or row * weight.shape[-2]
    return int(stored.data.ctypes.data) + index * matrix, row
