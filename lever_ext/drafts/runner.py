"""How a draft's language model is run: any causal LM through `transformers`, or a lean loop over
its layers.

Both keep KV rows in the order in which tokens were run; attention needs only a mask and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.families.family import LayerForm
from hybrimoe_plugin.families.registry import layer_form


class Runner(Protocol):
    """A language model with a KV cache of its own."""

    @property
    def rows(self) -> int:
        """KV rows held."""
        ...

    def reset(self) -> None:
        """Forget all rows. Mutates."""
        ...

    def run(
        self, tokens: Sequence[int], positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Final hidden states [N, H]; positions int64 [N], additive mask [N, rows + N]. Mutates:
        adds N rows.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these KV rows, in this order. Mutates."""
        ...


def make_runner(model: Any) -> Runner:
    """The lean loop where it knows the model, else the model itself."""
    config = model.config
    plain = config.hidden_act == "silu" and not getattr(config, "use_sliding_window", False)
    if plain and layer_form(config.model_type) is LayerForm.DENSE:
        return DirectRunner(model)
    return HostRunner(model)


class HostRunner:
    """The model's own forward; the lean loop's plain twin."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = model.base_model
        self._cache_name = cache_name(self._base)
        self._cache: Any = None

    @property
    def rows(self) -> int:
        return int(self._cache.get_seq_length()) if self._cache is not None else 0

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def run(
        self, tokens: Sequence[int], positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            output = self._base(
                input_ids=torch.tensor([tokens]),
                position_ids=positions[None],
                attention_mask=mask[None, None],
                use_cache=True,
                **{self._cache_name: self._cache},
            )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.as_tensor(rows, dtype=torch.long)
        for layer in self._cache.layers:
            layer.keys = layer.keys.index_select(2, index)
            layer.values = layer.values.index_select(2, index)


class DirectRunner:
    """A loop over the layers' own linears and norms without the host's overhead per layer.

    Measured on SmolLM2 in 3 bits, 2 threads, 1 row: 19 ms through `transformers`, half of it
    overhead.

    Args:
        model: with layers of the form `LayerForm.DENSE`, on the CPU.
    """

    def __init__(self, model: Any) -> None:
        base, config = model.base_model, model.config
        self._base = base
        self._layers = list(base.layers)
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self.tapped: frozenset[int] = frozenset()
        """Layers whose FFN inputs a run keeps."""
        self.taps: list[torch.Tensor] = []
        """Of the last run, [N, H] for each tapped layer."""
        self._rows = 0
        self._capacity = 0
        self._keys: list[torch.Tensor] = []
        """For each layer float32 [KV heads, capacity, head size]: small products are faster than in
        bfloat16.
        """
        self._values: list[torch.Tensor] = []

    @property
    def rows(self) -> int:
        return self._rows

    def reset(self) -> None:
        self._rows = 0

    def run(
        self, tokens: Sequence[int], positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        count = len(tokens)
        self._reserve(self._rows + count)
        self.taps = []
        with torch.inference_mode():
            hidden = self._base.embed_tokens(torch.tensor(tokens))
            cos, sin = self._base.rotary_emb(hidden, positions[None])
            # Queries of one KV head lie one after another: head r of the group, then row n.
            group = self._heads // self._kv_heads
            seen = mask.float().repeat(group, 1)
            for index, layer in enumerate(self._layers):
                attended = self._attend(
                    index, layer.self_attn, _norm(layer.input_layernorm, hidden), cos, sin, seen
                )
                hidden = hidden + attended
                inner = _norm(layer.post_attention_layernorm, hidden)
                if index in self.tapped:
                    self.taps.append(inner)
                mlp = layer.mlp
                hidden = hidden + mlp.down_proj(
                    F.silu(mlp.gate_proj(inner)).mul_(mlp.up_proj(inner))
                )
            self._rows += count
            return _norm(self._base.norm, hidden)

    def _attend(
        self,
        index: int,
        attention: Any,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attention output [N, H] of one layer for its normed input [N, H]; writes the layer's KV
        rows.
        """
        count, size, rows = value.shape[0], self._size, self._rows + value.shape[0]
        queries = attention.q_proj(value).view(count, self._heads, size)
        keys = attention.k_proj(value).view(count, self._kv_heads, size)
        if hasattr(attention, "q_norm"):
            queries, keys = _norm(attention.q_norm, queries), _norm(attention.k_norm, keys)
        both = torch.cat([queries, keys], dim=1).transpose(0, 1)
        half = size // 2
        both = both * cos + torch.cat([-both[..., half:], both[..., :half]], dim=-1) * sin
        self._keys[index][:, self._rows : rows] = both[self._heads :]
        self._values[index][:, self._rows : rows] = (
            attention.v_proj(value).view(count, -1, size).transpose(0, 1)
        )
        grouped = both[: self._heads].reshape(self._kv_heads, -1, size).float()
        weights = torch.baddbmm(
            mask[None], grouped, self._keys[index][:, :rows].transpose(1, 2), alpha=size**-0.5
        ).softmax(dim=-1)
        mixed = weights @ self._values[index][:, :rows]
        joined = (
            mixed.view(self._heads, count, size).transpose(0, 1).reshape(count, -1).to(value.dtype)
        )
        result: torch.Tensor = attention.o_proj(joined)
        return result

    def keep(self, rows: Sequence[int]) -> None:
        start = next((place for place, row in enumerate(rows) if row != place), len(rows))
        index = torch.as_tensor(rows[start:], dtype=torch.long)
        if len(index):
            for part in (*self._keys, *self._values):
                part[:, start : len(rows)] = part[:, index]
        self._rows = len(rows)

    def _reserve(self, rows: int) -> None:
        if rows <= self._capacity:
            return
        capacity = max(2 * self._capacity, rows, 512)
        shape = (self._kv_heads, capacity, self._size)
        grown: list[list[torch.Tensor]] = []
        for old in (self._keys, self._values):
            new = [torch.empty(shape) for _ in self._layers]
            for target, source in zip(new, old, strict=False):
                target[:, : self._rows] = source[:, : self._rows]
            grown.append(new)
        self._keys, self._values = grown
        self._capacity = (
            capacity  # last: an interrupt must not leave a promise that the buffers do not keep
        )


def _norm(norm: Any, value: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(value, norm.weight.shape, norm.weight, norm.variance_epsilon)
