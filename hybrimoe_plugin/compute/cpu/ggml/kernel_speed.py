"""How fast ggml's two kernels for a product with one row are on this machine.

A plain product of one row goes through llamafile's tiles where they have the type, the indexed
product (`ggml_mul_mat_id`) always through ggml's own loop. On an AMD EPYC the tiles read Q8_0 at
7 GB/s a thread where the loop reads it at 20; on an Intel Xeon the tiles are twice as fast as the
loop (docs/LOG.md). So both are measured, of those that are right (`accuracy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_COLUMNS = 4096
_MATRIX_BYTES = 64 << 20
"""Larger than most last-level caches: inside of them the other kernel may be the faster one."""
_REPEATS = 7
_EQUAL = 1.1
"""Ratio up to which the indexed product counts as equally fast.

Most types use the same loop in both kernels. Then the indexed product is to be preferred, since K
experts are a single one of it.
"""

RunProduct = Callable[[], None]
"""Multiplies one row by the measured matrix."""


class KernelSpeed(NamedTuple):
    """How fast one row is multiplied by matrices of a type that lie in memory, not in a cache."""

    indexed: bool
    """Whether `matmul_id` is to be taken, even for a single matrix.

    It is as fast as `matmul` or faster, or alone right.
    """
    ns: float
    """The faster kernel's time for one value of the matrix."""
    plain_factor: float = 1.0
    """The plain product's time in times of the indexed one; infinite where the plain one is wrong,
    and 0 where it alone is right.
    """


def measured_matrix(type_name: str) -> QuantizedMatrix:
    """The matrix that is multiplied to measure a type."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    row_bytes = _COLUMNS // block * block_bytes
    rows = _MATRIX_BYTES // row_bytes
    data = np.ones(rows * row_bytes, np.uint8)
    return QuantizedMatrix(data, type_name, (rows, _COLUMNS))


def fastest(products: Mapping[bool, RunProduct], values: int) -> KernelSpeed:
    """Time kernels in turn.

    Args:
        products: one or both, by whether they are indexed.
        values: values of the matrix that each of them multiplies.
    """
    ns = dict.fromkeys(products, 1 << 62)
    for _ in range(_REPEATS):
        for indexed, run in products.items():
            ns[indexed] = min(ns[indexed], _spent_ns(run))
    indexed = True in ns and (False not in ns or ns[True] < _EQUAL * ns[False])
    return KernelSpeed(indexed, ns[indexed] / values, _plain_factor(ns))


def _plain_factor(ns: Mapping[bool, int]) -> float:
    if len(ns) == 2:
        return ns[False] / ns[True]
    return math.inf if True in ns else 0.0


def _spent_ns(run: RunProduct) -> int:
    started = perf_counter_ns()
    run()
    return perf_counter_ns() - started
