"""Let a finished ggml graph compute fewer rows than it was built for, at other addresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.tensor import GraphTensor

Integers = NDArray[np.int64]


class Resized:
    """Tensors [rows, N] of one graph, float32 and contiguous, whose number of rows is set by runs.

    ggml reads sizes, strides and addresses anew in every run, and passes over tensors without
    rows. Its working memory was measured with the rows that the graph was built with, so there may
    be fewer, never more.

    Args:
        tensors: their rows are computed independently of each other.
    """

    def __init__(self, graph: Graph, tensors: Sequence[GraphTensor]) -> None:
        assert all(len(tensor.shape) == 2 for tensor in tensors)
        self._words, places = graph.structures(tensors)
        sizes = places + graph.sizes_at
        self._rows_at = sizes + 1
        self._strides_at = np.stack((sizes + 6, sizes + 7))
        self._data_at = places + graph.data_at
        self._most = np.array([tensor.shape[0] for tensor in tensors], np.int64)
        self._row_bytes = np.array([4 * tensor.shape[1] for tensor in tensors], np.int64)
        self._addresses = self._words[self._data_at]

    def set(self, rows: Integers | int, starts: Integers | None = None) -> None:
        """Let the next runs compute so many rows of each tensor; of none where it is 0.

        Args:
            rows: of each tensor, or of all alike.
            starts: the row of its buffer with which each tensor begins; by default as it is. The
                rows from there on must lie in the buffer.
        """
        assert np.all(rows <= self._most), "working memory was measured for fewer rows"
        self._words[self._rows_at] = rows
        self._words[self._strides_at] = np.maximum(rows, 1) * self._row_bytes
        if starts is not None:
            self._words[self._data_at] = self._addresses + starts * self._row_bytes


class Pointed:
    """Stored matrices of one graph, all of one type and shape, that runs read at other addresses.

    The caller keeps what lies at the addresses.
    """

    def __init__(self, graph: Graph, weights: Sequence[GraphTensor]) -> None:
        self._words, places = graph.structures(weights)
        self._data_at = places + graph.data_at

    def set(self, addresses: Integers) -> None:
        """Let the next runs read the first matrices at these addresses."""
        self._words[self._data_at[: len(addresses)]] = addresses
