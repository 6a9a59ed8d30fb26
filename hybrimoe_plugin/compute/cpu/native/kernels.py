"""Which of the operations this machine has, and ggml's functions that they call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.compute.cpu.ggml.binding import GgmlBinding
from hybrimoe_plugin.compute.cpu.native.structures import GraphOf, Kind

try:
    from hybrimoe_plugin.compute.cpu.native import operations as operations
except ImportError:  # no C compiler was there when it was installed
    operations = None  # type: ignore[assignment]

LAYOUT = 1
"""Of the structures; native.h has the same number."""


def compiled() -> bool:
    """Whether the operations were compiled."""
    return getattr(operations, "layout", 0) == LAYOUT


EXACT = frozenset({"F16", "F32"})
"""Types whose values bfloat16 would round; tiles leave them to ggml."""

OWN_DOTS = frozenset({"Q4_K", "Q5_0", "Q6_K", "Q8_0"})
"""Types whose products of one row are compiled too, for processors with VNNI."""

OWN_PANELS = frozenset({"Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0"})
"""Types that are written out in bfloat16 at once, for processors with tiles."""

TILES = ("ggml's products, without tiles", "AVX-512's bfloat16", "AMX tiles")
"""What multiplies many rows, by the module's `tiles`."""

TILE_ROWS = 16
TILE_DEPTH = 32
"""A tile's rows, and its columns in bfloat16."""
PANEL = 32
"""Rows of weights of a chunk by tiles."""


class TypeKernels(NamedTuple):
    """One type of weights."""

    kind: Kind
    convert: int | None
    """ggml's function that brings activations into the type that its products take; None where
    they take float32.
    """
    x_block: int
    x_block_bytes: int
    """Values and bytes of a block of that type."""

    def x_bytes(self, columns: int) -> int:
        """Of a row of converted activations."""
        return columns // self.x_block * self.x_block_bytes


class Kernels:
    """The compiled operations over one library of ggml.

    Raises:
        ImportError: they were not compiled.
    """

    def __init__(self, binding: GgmlBinding) -> None:
        if not compiled():
            raise ImportError("hybrimoe_plugin.compute.cpu.native.operations was not compiled")
        self._binding = binding
        self._types: dict[tuple[str, bool], TypeKernels] = {}
        self.tiles = operations.tiles > 0
        """Whether products of many rows go by tiles."""
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(GraphOf), ctypes.c_int64, ctypes.c_int64
        )
        self._run = prototype(operations.run_graphs)

    def can_tile(self, type_name: str, columns: int) -> bool:
        """Whether products of many rows with matrices [N, columns] of a type may go by tiles."""
        return self.tiles and type_name not in EXACT and columns % TILE_DEPTH == 0

    def run(self, graphs: Sequence[GraphOf], threads: int) -> None:
        """Compute finished graphs, one after the other."""
        status = self._run((GraphOf * len(graphs))(*graphs), len(graphs), threads)
        assert status == 0, "too many operations or chunks"

    def of(self, type_name: str, dot: bool = True) -> TypeKernels:
        """What products with weights of this type take. ggml must know the type.

        Args:
            dot: ggml's dot for the type is right on this machine. Else rows of weights are
                dequantised, which is slower, and activations are not rounded.
        """
        found = self._types.get((type_name, dot))
        if found is None:
            found = self._types[type_name, dot] = self._find(type_name, dot)
        return found

    def _find(self, type_name: str, dot: bool) -> TypeKernels:
        number = GGMLQuantizationType[type_name]
        traits = self._binding.type_traits(number)
        panel = None
        if operations.tiles and type_name in OWN_PANELS:
            panel = getattr(operations, f"panel_{type_name.lower()}")
        if not dot:
            kind = Kind(None, traits.to_float, None, panel, *GGML_QUANT_SIZES[number])
            return TypeKernels(kind, None, *GGML_QUANT_SIZES[GGMLQuantizationType.F32])
        x_number = GGMLQuantizationType(traits.dot_type)
        convert = self._binding.type_traits(x_number).from_float
        dots = None
        if operations.vnni and type_name in OWN_DOTS:
            dots = getattr(operations, f"dots_{type_name.lower()}")
        kind = Kind(traits.dot, traits.to_float, dots, panel, *GGML_QUANT_SIZES[number])
        return TypeKernels(kind, convert, *GGML_QUANT_SIZES[x_number])
