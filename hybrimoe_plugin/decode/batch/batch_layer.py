"""A decoder layer's steps of one fixed number of sequences as CUDA graphs, once proved right."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer
from hybrimoe_plugin.decode.batch.batch_state import BatchState
from hybrimoe_plugin.decode.cuda_layer import PROOFS, CudaLayer


class BatchLayer(CudaLayer):
    """One token of each of R sequences as graphs, any other call eagerly.

    It is captured and proved as a step of one sequence is, but has its own graphs, KV cache and
    state. In every layer the host reads the routing of all R tokens before it goes on.

    Args: as for `CudaLayer`.
    """

    state: BatchState

    @property
    def refused(self) -> bool:
        """Whether it runs eagerly from now on."""
        return self._refused

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache = None if args or self._refused else self._cache_of(hidden_states, kwargs)
        if cache is None or not self._take(cache):
            return self._eager(hidden_states, *args, **kwargs)
        if not self._set_step(cache.get_seq_length(), kwargs):
            return self._eager(hidden_states, *args, **kwargs)
        graphs = self._current_graphs()
        if graphs is None or self._proofs < PROOFS:
            return self._prove(cache, hidden_states, kwargs)
        output = graphs.run(hidden_states, self._call_experts)
        cache.advance()
        return output.clone() if self._output_hooks else output

    def _cache_of(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> GrowingLayer | None:
        """This layer's cache; None if the call is not one that CUDA graphs serve."""
        cache = super()._cache_of(hidden_states, {**kwargs, "attention_mask": None})
        if cache is None:
            return None
        mask = kwargs.get("attention_mask")
        return cache if self.state.takes_mask(mask, cache.get_seq_length()) else None

    def _take(self, cache: GrowingLayer) -> bool:
        """Move the sequences into the buffers; whether there was memory for them."""
        try:
            self.buffers.take(cache)
        except torch.OutOfMemoryError:
            self._discard()
            self._refuse(f"{self._key} has no memory for their KV cache")
            return False
        return True

    def _refuse(self, problem: str) -> None:
        super()._refuse(f"in steps of {self.state.batch} sequences {problem}")

    def _set_step(self, held: int, kwargs: dict[str, Any]) -> bool:
        embeddings, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
        return self.state.set_step(held, embeddings, mask)
