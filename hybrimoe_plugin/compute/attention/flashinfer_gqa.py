"""flashinfer's decode attention with grouped queries.

Written against flashinfer 0.7's Python API (`BatchDecodeWithPagedKVCacheWrapper`). A
fixed-address cache is read as pages of 16 tokens by its strides. What changes from step to step
lies in the wrapper's own device buffers; `plan` sets it, outside the graphs.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention import flashinfer_pages
from hybrimoe_plugin.compute.attention.decode_attention import GQAShape
from hybrimoe_plugin.compute.attention.flashinfer_pages import PAGE, pages, table

TENSOR_CORES_FROM = 4
"""Query heads for each key head from which its documentation advises its tensor-core kernel."""


class FlashinferGQA:
    """Attention of one token over keys and values [1, groups, capacity, width].

    Args:
        library: the flashinfer module.
    """

    name = "flashinfer"

    def __init__(self, library: Any, shape: GQAShape, device: torch.device) -> None:
        self.shape = shape

        def buffer(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        with torch.inference_mode(False):
            self._wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
                torch.zeros(flashinfer_pages.WORKSPACE_BYTES, dtype=torch.uint8, device=device),
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=shape.heads >= TENSOR_CORES_FROM * shape.groups,
                paged_kv_indptr_buffer=buffer(2),
                paged_kv_indices_buffer=buffer(shape.capacity // PAGE),
                paged_kv_last_page_len_buffer=buffer(1),
            )

    def plan(self, held: int) -> None:
        """Set the step: its token is number `held` in the cache and attends to all up to itself.

        Not to be called while capturing.
        """
        self._wrapper.plan(
            *table(held),
            torch.tensor([held % PAGE + 1], dtype=torch.int32),
            self.shape.heads,
            self.shape.groups,
            self.shape.width,
            PAGE,
            q_data_type=self.shape.dtype,
            kv_data_type=self.shape.dtype,
            sm_scale=self.shape.scaling,
        )

    def __call__(self, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """[1, heads, 1, width] from queries of that shape, keys and values."""
        keys, values = cache
        out: torch.Tensor = self._wrapper.run(query[:, :, 0], (pages(keys), pages(values)))
        return out[:, :, None]
