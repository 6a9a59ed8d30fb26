"""Token embeddings that stay quantised: only the rows of a call's tokens are dequantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrimoe_plugin.compute.cpu.ggml import check_stored
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.errors import BackendError, InputError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

__getattr__ = old_names(__name__)


class QuantizedEmbedding(DenseOperator):
    """The embedding table as stored, dequantised row by row as tokens ask for it.

    A plain embedding where the settings ask for it, or where the table lies elsewhere.
    """

    plain_class = nn.Embedding

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.num_embeddings = orig_module.num_embeddings
        self.embedding_dim = orig_module.embedding_dim
        self.padding_idx = orig_module.padding_idx
        self.dtype = orig_module.weight.dtype
        self._function: GgmlFunction | None = None
        if self.ggml is None:
            self.weight = orig_module.weight

    def take(self, stored: QuantizedMatrix) -> None:
        """Use this table. Raises: BackendError: a type without a kernel, or another shape."""
        shape = self.num_embeddings, self.embedding_dim
        if stored.shape != shape:
            raise BackendError(f"{self.key}: expected {shape}, found {stored.shape}")
        assert self.ggml is not None
        self.ggml.require(stored.type_name)
        check_stored(stored)
        self._function = GgmlFunction(
            self.ggml,
            lambda graph, ids: [graph.rows(graph.weight(stored), ids)],
            threads=1,
            ids=True,
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., H] from ids [...].

        Raises:
            InputError: ids that are no whole numbers, or an id outside the vocabulary.
        """
        if self.ggml is None:
            return F.embedding(ids, self.weight, self.padding_idx)
        kind = getattr(ids, "dtype", type(ids).__name__)
        if kind not in (torch.int64, torch.int32):
            raise InputError(f"{self.key}: token ids must be int64 or int32, found {kind}")
        flat = ids.reshape(-1)
        low, high = torch.aminmax(flat) if len(flat) else (0, 0)
        if not (int(low) >= 0 and int(high) < self.num_embeddings):
            raise InputError(
                f"token ids must be 0 to {self.num_embeddings - 1}, found {int(low)} to {int(high)}"
            )
        assert self._function is not None, "take() comes first"
        (rows,) = self._function(flat, len(flat))
        return rows.to(self.dtype, copy=True).view(*ids.shape, self.embedding_dim)
