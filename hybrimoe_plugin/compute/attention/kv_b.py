"""The projection from latents to keys and values (kv_b) of DeepSeek's latent attention.

The cache holds one latent for each token. kv_b consists of W_uk and W_uv, which expand a latent
into the key and the value of every head. For one head, a query q and the cached tokens c
(DeepSeek-V2, section 2.1; the rotary part of keys is left out here):

    expanded   key[c]   = W_uk . latent[c]          score[c] = q . key[c]
               value[c] = W_uv . latent[c]          out      = sum_c p[c] value[c]

    absorbed   score[c] = (W_uk^T . q) . latent[c]  out      = W_uv . (sum_c p[c] latent[c])

                 q [nope] -- W_uk^T --> [latent] -- attention over latents --> [latent] -- W_uv -->

Both give the same. Expanded, every cached token goes through kv_b; absorbed, only the query and the
result do. DeepSeek-V2-Lite has 16 heads, nope = values = 128 and latent = 512. For a decode step
behind 1,000 tokens, kv_b takes this many multiplications in each layer:

    expanded   1,000 tokens x 16 heads x 512 x (128 + 128) = 2,097 million
    absorbed                  16 heads x 512 x (128 + 128) =     2 million

Attention itself takes more of them absorbed, since latents are wider than keys (12 million more
here). For a prompt, which has as many queries as keys, expanded is the cheaper form.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml, GraphTensor, check_stored
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


class AbsorbedKVB(Protocol):
    """kv_b, applied to queries and results in place of cached latents."""

    def into_latent(self, query: torch.Tensor) -> torch.Tensor:
        """W_uk^T: [B, heads, T, latent] from the queries' part without positions [B, heads, T,
        nope].
        """
        ...

    def out_of_latent(self, latents: torch.Tensor) -> torch.Tensor:
        """W_uv: [B, heads, T, values] from [B, heads, T, latent]."""
        ...


class DenseKVB:
    """kv_b as the model's own linear.

    Args:
        owner: holds it as `kv_b_proj`, whose weight is [heads x (nope + values), latent]. It is
            looked up at every call, since adapters put others in its place.
    """

    def __init__(self, owner: Any, heads: int, nope: int) -> None:
        self._owner = owner
        self._heads = heads
        self._nope = nope

    def into_latent(self, query: torch.Tensor) -> torch.Tensor:
        w_uk = self._weight()[:, : self._nope]
        return torch.matmul(query, w_uk)

    def out_of_latent(self, latents: torch.Tensor) -> torch.Tensor:
        w_uv = self._weight()[:, self._nope :]
        return torch.matmul(latents, w_uv.transpose(1, 2))

    def expand(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys without their rotary part [B, heads, C, nope] and values, from latents [B, C,
        latent].
        """
        batch, count, _ = latents.shape
        expanded = self._owner.kv_b_proj(latents).view(batch, count, self._heads, -1)
        by_head = expanded.transpose(1, 2)
        return by_head[..., : self._nope], by_head[..., self._nope :]

    def _weight(self) -> torch.Tensor:
        """[heads, nope + values, latent]."""
        weight: torch.Tensor = self._owner.kv_b_proj.weight
        return weight.view(self._heads, -1, weight.shape[-1])


class QuantizedKVB:
    """kv_b as the file stores it, one matrix for each head, computed by ggml.

    Args:
        w_uk: [heads, latent, nope], transposed.
        w_uv: [heads, values, latent].

    Raises:
        BackendError: a type without a kernel.
    """

    def __init__(self, ggml: Ggml, w_uk: QuantizedMatrix, w_uv: QuantizedMatrix) -> None:
        for stored in (w_uk, w_uv):
            ggml.require(stored.type_name)
            check_stored(stored)
        self._w_uk = w_uk
        self._w_uv = w_uv
        self._into = GgmlFunction(ggml, lambda graph, x: [self.build_into_latent(graph, x)])
        self._out = GgmlFunction(ggml, lambda graph, x: [self.build_out_of_latent(graph, x)])

    def build_into_latent(
        self, graph: AnyGraph, query: GraphTensor, out: torch.Tensor | None = None
    ) -> GraphTensor:
        """[heads, T, latent] from [heads, T, nope] in a graph, into `out` where it is given."""
        return graph.matmul(graph.weight(self._w_uk), query, out)

    def build_out_of_latent(self, graph: AnyGraph, latents: GraphTensor) -> GraphTensor:
        """[heads, T, values] from [heads, T, latent] in a graph."""
        return graph.matmul(graph.weight(self._w_uv), latents)

    def into_latent(self, query: torch.Tensor) -> torch.Tensor:
        return _by_head(self._into, query)

    def out_of_latent(self, latents: torch.Tensor) -> torch.Tensor:
        return _by_head(self._out, latents)


def _by_head(function: GgmlFunction, x: torch.Tensor) -> torch.Tensor:
    """Each head's matrix applied to its values: [B, heads, T, N] from [B, heads, T, M]."""
    batch, heads, count, width = x.shape
    if batch == count == 1:
        (y,) = function(x[0], 1)
        return y[None].to(x.dtype)
    tokens = batch * count
    (y,) = function(x.transpose(0, 1).reshape(heads, tokens, width), tokens)
    return y.view(heads, batch, count, -1).transpose(0, 1).to(x.dtype)
