"""DeepSeek's latent attention: the cache holds latents, and one-token calls attend to them without
expanding them.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention.attend import attend, attend_latents
from hybrimoe_plugin.compute.attention.flashinfer_mla import LatentShape
from hybrimoe_plugin.compute.attention.kv_cache import FixedCache, growing
from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor, buffer, check_stored
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.attention import Turn, angles, rotate, rotate_pairs
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.linear import LinearGroup, RowGraphs, as_stored
from hybrimoe_plugin.operators.norm import FusedRMSNorm
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

__getattr__ = old_names(__name__)


class FusedMLA(DenseOperator):
    """Multi-head latent attention in its absorbed form where the matrices are as stored or there is
    one token.

    transformers expands keys and values of the whole context at every step. Absorbed (DeepSeek-V2,
    section 2.1), W_uk goes into the query and W_uv behind the sum, so a step reads the cached
    latents and expands none.
    """

    keeps_latents = True
    q_b_proj: Any
    q_a_layernorm: Any
    kv_a_layernorm: Any
    o_proj: Any
    q_proj: Any
    q_a_proj: Any
    kv_a_proj_with_mqa: Any

    def __init__(
        self, key: str, gguf_loader: Any, config: Any, orig_module: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.layer_idx = int(orig_module.layer_idx)
        self.scaling = float(orig_module.scaling)
        self.heads = int(orig_module.num_heads)
        self.latent, self.values = int(orig_module.kv_lora_rank), int(orig_module.v_head_dim)
        self.nope, self.rope = int(orig_module.qk_nope_head_dim), int(orig_module.qk_rope_head_dim)
        # Of DeepSeek-V3 alone: transformers' V2 does not look at such a key.
        self.halves = hasattr(type(config), "rope_interleave") and not config.rope_interleave
        names = ["q_proj"] if orig_module.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
        for name in (*names, "kv_a_proj_with_mqa", "o_proj"):
            setattr(self, name, as_stored(self, name, getattr(orig_module, name)))
        for name in (
            "kv_a_layernorm",
            *(["q_a_layernorm"] if orig_module.q_lora_rank is not None else []),
        ):
            norm = FusedRMSNorm(
                f"{key}.{name}", gguf_loader, config, getattr(orig_module, name), **kwargs
            )
            setattr(self, name, norm)
        self._inputs = LinearGroup(self.ggml, self, (names[0], "kv_a_proj_with_mqa"))
        self._split: tuple[QuantizedMatrix, QuantizedMatrix] | None = None
        self._graphs: tuple[RowGraphs, RowGraphs] | None = None
        if self.ggml is None:
            self.kv_b_proj = orig_module.kv_b_proj

    def take_split(self, key: QuantizedMatrix, value: QuantizedMatrix) -> None:
        """The two parts of kv_b: [heads, latent, nope], which is W_uk transposed, and [heads,
        values, latent].

        Raises:
            BackendError: another shape, or a type without a kernel.
        """
        wanted = (self.heads, self.latent, self.nope), (self.heads, self.values, self.latent)
        if (key.shape, value.shape) != wanted:
            raise BackendError(
                f"{self.key}: expected kv_b as {wanted}, found {(key.shape, value.shape)}"
            )
        assert self.ggml is not None
        check_stored(key)
        check_stored(value)
        self._split = key, value
        self._graphs = (
            RowGraphs(self.ggml, lambda graph, x: [graph.matmul(graph.weight(key), x)]),
            RowGraphs(self.ggml, lambda graph, x: [graph.matmul(graph.weight(value), x)]),
        )

    def decode_shape(self, rows: torch.Tensor) -> LatentShape:
        """What decoding over a cache of fixed place looks like whose rows [1, 1, S, latent + rope]
        are given.
        """
        return LatentShape(
            self.heads, self.latent, self.rope, rows.shape[2], rows.dtype, self.scaling
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """([B, T, H], None) from [B, T, H]; position embeddings are (cos, sin) or complex. Mutates:
        the cache.
        """
        batch, count, width = hidden_states.shape
        query, compressed = (
            part.to(hidden_states.dtype) for part in self._inputs(hidden_states.reshape(-1, width))
        )
        if "q_b_proj" in self._modules:
            query = self.q_b_proj(self.q_a_layernorm(query))
        query = query.view(batch, count, self.heads, -1).transpose(1, 2)
        plain, rotary = query.split((self.nope, self.rope), dim=-1)
        latent, key_rotary = compressed.view(batch, 1, count, -1).split(
            (self.latent, self.rope), dim=-1
        )
        cos, sin = angles(position_embeddings, self.rope // 2)
        turned = self.turn[0](torch.cat((rotary, key_rotary), dim=1), cos, sin).to(
            query.dtype
        )  # all heads at once
        rotary, key_rotary = turned[:, :-1], turned[:, -1:]
        # One row per token, [latent, rotary part]: the absorbed form's keys, whose first part are
        # its values.
        rows = torch.cat((self.kv_a_layernorm(latent), key_rotary), dim=-1)
        cache = cache if cache is not None else past_key_values
        rows = self._kept(rows, cache)
        if self._graphs is None and count > 1:
            out = self._expanded(plain, rotary, rows, attention_mask)
        else:
            query = torch.cat((self._into_latent(plain), rotary), dim=-1)
            if isinstance(cache, FixedCache) and cache.kernel is not None:
                latents = cache.kernel(query, rows)
            else:
                latents = attend_latents(query, rows, attention_mask, self.scaling, self.latent)
            out = self._out_of_latent(latents)
        return self.o_proj(out.transpose(1, 2).reshape(batch, count, -1)), None

    def _kept(self, rows: torch.Tensor, cache: Any) -> torch.Tensor:
        """All rows so far [B, 1, C, latent + rope]. Mutates: the cache."""
        if cache is None:
            return rows
        growing(cache, self.layer_idx)
        rows, _ = cache.update(rows, rows[..., :0], self.layer_idx)
        return rows

    # One token in two graphs (`row_step`).

    @property
    def turn(self) -> tuple[Turn, int]:
        return rotate if self.halves else rotate_pairs, self.rope

    def before(self, graph: Graph, x: GraphTensor, turned: GraphTensor) -> list[GraphTensor]:
        assert self._split is not None
        if "q_b_proj" in self._modules:
            query = self.q_b_proj.build(
                graph, self.q_a_layernorm.build(graph, self.q_a_proj.build(graph, x))
            )
        else:
            query = self.q_proj.build(graph, x)
        compressed = self.kv_a_proj_with_mqa.build(graph, x)
        heads, row = (
            query.value.view(self.heads, self.nope + self.rope),
            buffer(1, self.latent + self.rope),
        )
        latent = graph.view(compressed, compressed.value[:, : self.latent])
        rotary = graph.view(compressed, compressed.value[:, self.latent :])
        return [
            self.kv_a_layernorm.build(graph, latent, row[:, : self.latent]),
            # Behind it the row for the cache is whole, and that is what this output shows.
            graph.matmul(turned, rotary, row[:, self.latent :], indexed=False)._replace(data=row),
            graph.matmul(
                graph.weight(self._split[0]), graph.view(query, heads[:, None, : self.nope])
            ),
            graph.matmul(turned, graph.view(query, heads[:, None, self.nope :]), indexed=False),
        ]

    def between(self, parts: list[torch.Tensor], cache: Any) -> torch.Tensor:
        _, row, *query_parts = parts
        rows = self._kept(row[None, None], cache)
        query = torch.cat(query_parts, dim=-1)[None]
        return attend_latents(query, rows, None, self.scaling, self.latent)[0]

    def after(self, graph: Graph, attended: GraphTensor) -> GraphTensor:
        assert self._split is not None
        values = graph.matmul(graph.weight(self._split[1]), attended)
        return self.o_proj.build(graph, graph.view(values, values.value.view(1, -1)))

    def _into_latent(self, plain: torch.Tensor) -> torch.Tensor:
        """[B, heads, T, latent] from the queries' part without positions [B, heads, T, nope]."""
        if self._graphs is None:
            return torch.matmul(plain, self._kv_b()[:, : self.nope])
        return self._by_head(self._graphs[0], plain)

    def _out_of_latent(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, heads, T, values] from [B, heads, T, latent]."""
        if self._graphs is None:
            return torch.matmul(latents, self._kv_b()[:, self.nope :].transpose(1, 2))
        return self._by_head(self._graphs[1], latents)

    def _kv_b(self) -> torch.Tensor:
        """[heads, nope + values, latent]."""
        weight: torch.Tensor = self.kv_b_proj.weight
        return weight.view(self.heads, -1, self.latent)

    def _by_head(self, graphs: RowGraphs, x: torch.Tensor) -> torch.Tensor:
        """A stored matrix of each head applied to its rows, [B, heads, T, N] from [B,
        heads, T, M].
        """
        batch, heads, count, width = x.shape
        if batch == count == 1:
            (y,) = graphs(x[0], 1)
            return y[None].to(x.dtype)
        (y,) = graphs(x.transpose(0, 1).reshape(heads, batch * count, width), batch * count)
        return y.view(heads, batch, count, -1).transpose(0, 1).to(x.dtype)

    def _expanded(
        self,
        plain: torch.Tensor,
        rotary: torch.Tensor,
        rows: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, heads, T, values] with keys and values of the whole context written out."""
        latent, key_rotary = rows.split((self.latent, self.rope), dim=-1)
        expanded = (
            self.kv_b_proj(latent[:, 0])
            .view(*latent[:, 0].shape[:2], self.heads, -1)
            .transpose(1, 2)
        )
        keys, values = expanded.split((self.nope, self.values), dim=-1)
        keys = torch.cat((keys, key_rotary.expand(-1, self.heads, -1, -1)), dim=-1)
        return attend(
            torch.cat((plain, rotary), dim=-1), keys, values, mask, self.scaling, grouped=False
        )
