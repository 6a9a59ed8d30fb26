"""Let a finished ggml graph compute fewer rows than it was built for, at other addresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.tensor import GraphTensor

Integers = NDArray[np.int64]


class Resized:
    """Tensors [rows, N] of one graph, float32 and contiguous, whose number of rows is set for runs.

    ggml reads sizes, strides and addresses anew in every run, and passes over tensors without
    rows. Its working memory was measured with the rows that the graph was built with, so there may
    be fewer, never more.

    Args:
        groups: of as many tensors each; the first ones of all groups get the same rows, and so on.
            Rows are computed independently of each other.
    """

    def __init__(self, graph: Graph, groups: Sequence[Sequence[GraphTensor]]) -> None:
        tensors = [tensor for group in groups for tensor in group]
        assert all(len(tensor.shape) == 2 for tensor in tensors)
        self._words, places = graph.structures(tensors)
        places = places.reshape(len(groups), -1)
        sizes = places + graph.sizes_at
        self._rows_at = sizes + 1
        self._strides_at = np.stack((sizes + 6, sizes + 7))
        self._data_at = places + graph.data_at
        self._most = min(tensor.shape[0] for tensor in tensors)
        row_bytes = np.array([4 * tensor.shape[1] for tensor in tensors], np.int64)
        self._row_bytes = row_bytes.reshape(places.shape)
        self._addresses = self._words[self._data_at]

    def set(self, rows: Integers, starts: Integers) -> None:
        """Let the next runs compute so many rows of each tensor; none where it is 0.

        Args:
            rows: of each tensor of a group.
            starts: the row of its buffer with which each begins. The rows from there on must lie in
                the buffer.
        """
        assert rows.max() <= self._most, "working memory was measured for fewer rows"
        self._words[self._rows_at] = rows
        self._words[self._strides_at] = np.maximum(rows, 1) * self._row_bytes
        self._words[self._data_at] = self._addresses + starts * self._row_bytes


class Pointed:
    """Stored matrices of one graph that runs read at other addresses.

    The caller keeps what lies at the addresses.
    """

    def __init__(self, graph: Graph, groups: Sequence[Sequence[GraphTensor]]) -> None:
        """Of groups of as many matrices each, all of one type and shape."""
        weights = [weight for group in groups for weight in group]
        self._words, places = graph.structures(weights)
        self._data_at = places.reshape(len(groups), -1) + graph.data_at

    def set(self, addresses: Integers) -> None:
        """Let the next runs read the first matrices of each group at addresses [groups, U]."""
        self._words[self._data_at[:, : addresses.shape[1]]] = addresses
