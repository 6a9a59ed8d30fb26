"""flashinfer's decode attention over latents (DeepSeek-V2, section 2.1, absorbed).

Written against flashinfer 0.7's Python API (`mla.BatchMLAPagedAttentionWrapper`). A
fixed-address cache, which holds [latent, rotary part of the key] for each token, is read as packed
pages of 16 tokens. What changes from step to step lies in the wrapper's own device buffers; `plan`
sets it, outside the graphs.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention import flashinfer_pages
from hybrimoe_plugin.compute.attention.decode_attention import MLAShape
from hybrimoe_plugin.compute.attention.flashinfer_pages import PAGE, pages, table

HOPPER = 9, 0


class FlashinferMLA:
    """Attention of one token over a cache [1, 1, capacity, latent + rope].

    Args:
        library: the flashinfer module.
    """

    name = "flashinfer"

    def __init__(self, library: Any, shape: MLAShape, device: torch.device) -> None:
        self.shape = shape

        def buffer(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        with torch.inference_mode(False):
            self._wrapper = library.mla.BatchMLAPagedAttentionWrapper(
                torch.zeros(flashinfer_pages.WORKSPACE_BYTES, dtype=torch.uint8, device=device),
                use_cuda_graph=True,
                qo_indptr=buffer(2),
                kv_indptr=buffer(2),
                kv_indices=buffer(shape.capacity // PAGE),
                kv_len_arr=buffer(1),
                backend=_backend(device),
            )
        self._metadata = library.mla.MLAPlanMetadata

    def plan(self, held: int) -> None:
        """Set the step: its token is number `held` in the cache and attends to all up to itself.

        Not to be called while capturing.
        """
        begin, which = table(held)
        one = torch.tensor([0, 1], dtype=torch.int32)
        self._wrapper.plan(
            metadata=self._metadata.csr(
                one, begin, which, torch.tensor([held + 1], dtype=torch.int32)
            ),
            num_heads=self.shape.heads,
            head_dim_ckv=self.shape.latent,
            head_dim_kpe=self.shape.rope,
            page_size=PAGE,
            causal=False,  # one token attends to everything that the cache holds
            sm_scale=self.shape.scaling,
            q_data_type=self.shape.dtype,
            kv_data_type=self.shape.dtype,
        )

    def __call__(self, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """[1, heads, 1, latent] from queries [1, heads, 1, latent + rope] and the cache."""
        out: torch.Tensor = self._wrapper.run(query=query[:, :, 0], kv_cache=pages(cache[0])[:, 0])
        return out[:, :, None]


def _backend(device: torch.device) -> str:
    """A backend that may be planned again for a captured graph: FA3 on Hopper, else FA2."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    return "auto" if hopper else "fa2"
