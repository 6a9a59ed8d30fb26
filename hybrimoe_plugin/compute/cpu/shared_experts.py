"""One CPU backend for several engines.

Two pools of workers on the same cores would keep each other from running.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.weights.layer_weights import LayerWeights


class SharedCPU:
    """An engine's part of a backend that other engines use too, one call at a time.

    Args:
        backend: may hold layers of other engines already.
        first: how many it holds. The layers added next are this engine's.
    """

    def __init__(self, backend: CPUBackend, first: int) -> None:
        self.backend = backend
        self.name = backend.name
        self.workers = backend.workers
        self._first = first

    def add_layer(self, weights: LayerWeights) -> None:
        self.backend.add_layer(weights)

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        self.backend.submit(self._first + layer, hidden, topk_ids, topk_weights, mine)

    def sync(self) -> torch.Tensor:
        return self.backend.sync()

    def abandon(self) -> None:
        self.backend.abandon()

    def close(self) -> None:
        """Close the backend for all: engines of one model end together."""
        self.backend.close()
