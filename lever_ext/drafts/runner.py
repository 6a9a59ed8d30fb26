"""How a draft's language model is run: through `transformers`, or by a direct loop over its layers.

Both keep KV entries in the order in which tokens were run; attention needs only a mask and
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.families.family import LayerForm
from hybrimoe_plugin.families.registry import layer_form

LEAST_CAPACITY = 512
"""KV entries that the direct loop makes room for at first."""


class Runner(Protocol):
    """A language model with a KV cache of its own."""

    @property
    def entries(self) -> int:
        """KV entries held."""
        ...

    def reset(self) -> None:
        """Forget all entries. Mutates."""
        ...

    def run(
        self,
        tokens: Sequence[int],
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Final hidden states [N, H].

        Args:
            tokens: N of them.
            positions: int64 [N].
            mask: additive, [N, entries + N].

        Mutates: adds N entries.
        """
        ...

    def keep(self, entries: Sequence[int]) -> None:
        """Keep these KV entries, in this order. Mutates."""
        ...


def make_runner(model: Any) -> Runner:
    """The direct loop where it knows the model, else the model itself."""
    config = model.config
    plain = getattr(config, "hidden_act", None) == "silu" and not getattr(
        config, "use_sliding_window", False
    )
    if plain and layer_form(config.model_type) is LayerForm.DENSE:
        return DirectRunner(model)
    return HostRunner(model)


class HostRunner:
    """The model's own forward; the direct loop's plain twin."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = model.base_model
        self._cache_name = cache_name(self._base)
        self._cache: Any = None

    @property
    def entries(self) -> int:
        return int(self._cache.get_seq_length()) if self._cache is not None else 0

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def run(
        self,
        tokens: Sequence[int],
        positions: torch.Tensor,
        mask: torch.Tensor,
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

    def keep(self, entries: Sequence[int]) -> None:
        index = torch.as_tensor(entries, dtype=torch.long)
        for layer in self._cache.layers:
            layer.keys = layer.keys.index_select(2, index)
            layer.values = layer.values.index_select(2, index)


class DirectRunner:
    """A loop over the layers' own linears and norms without the host's overhead per layer.

    Measured on SmolLM2 in 3 bits, 2 threads, 1 token: 19 ms through `transformers`, half of it
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
        """Of a head."""
        self.tapped: frozenset[int] = frozenset()
        """Layers whose FFN inputs a run keeps."""
        self.taps: list[torch.Tensor] = []
        """Of the last run, [N, H] for each tapped layer."""
        self._entries = 0
        self._capacity = 0
        """Entries that the buffers have room for."""
        self._keys: list[torch.Tensor] = []
        """For each layer float32 [KV heads, capacity, head size]. Small products are faster than in
        bfloat16.
        """
        self._values: list[torch.Tensor] = []
        """The same for values."""

    @property
    def entries(self) -> int:
        return self._entries

    def reset(self) -> None:
        self._entries = 0

    def run(
        self,
        tokens: Sequence[int],
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        count = len(tokens)
        self._reserve(self._entries + count)
        self.taps = []
        with torch.inference_mode():
            hidden = self._base.embed_tokens(torch.tensor(tokens))
            cos, sin = self._base.rotary_emb(hidden, positions[None])
            # Queries of one KV head lie one after another: head r of the group, then token n.
            group = self._heads // self._kv_heads
            grouped_mask = mask.float().repeat(group, 1)
            for index, layer in enumerate(self._layers):
                inner = _norm(layer.input_layernorm, hidden)
                attended = self._attend(index, layer.self_attn, inner, cos, sin, grouped_mask)
                hidden = hidden + attended
                inner = _norm(layer.post_attention_layernorm, hidden)
                if index in self.tapped:
                    self.taps.append(inner)
                gated = F.silu(layer.mlp.gate_proj(inner))
                gated.mul_(layer.mlp.up_proj(inner))
                hidden = hidden + layer.mlp.down_proj(gated)
            self._entries += count
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
        """Attention output [N, H] of one layer.

        Args:
            index: of the layer.
            attention: its module.
            value: its normed input, [N, H].
            cos: of the rotary embedding.
            sin: of the rotary embedding.
            mask: additive, for the queries of one KV head.

        Mutates: the layer's KV entries.
        """
        count, size = value.shape[0], self._size
        first, end = self._entries, self._entries + count
        queries = attention.q_proj(value).view(count, self._heads, size)
        keys = attention.k_proj(value).view(count, self._kv_heads, size)
        values = attention.v_proj(value).view(count, -1, size)
        if hasattr(attention, "q_norm"):
            queries = _norm(attention.q_norm, queries)
            keys = _norm(attention.k_norm, keys)
        both = torch.cat([queries, keys], dim=1).transpose(0, 1)
        both = both * cos + _rotated_half(both) * sin
        self._keys[index][:, first:end] = both[self._heads :]
        self._values[index][:, first:end] = values.transpose(0, 1)

        grouped = both[: self._heads].reshape(self._kv_heads, -1, size).float()
        known_keys = self._keys[index][:, :end].transpose(1, 2)
        scores = torch.baddbmm(mask[None], grouped, known_keys, alpha=size**-0.5)
        mixed = scores.softmax(dim=-1) @ self._values[index][:, :end]
        by_token = mixed.view(self._heads, count, size).transpose(0, 1)
        joined = by_token.reshape(count, -1).to(value.dtype)
        result: torch.Tensor = attention.o_proj(joined)
        return result

    def keep(self, entries: Sequence[int]) -> None:
        # The first entries mostly stay where they are.
        start = next((place for place, entry in enumerate(entries) if entry != place), len(entries))
        index = torch.as_tensor(entries[start:], dtype=torch.long)
        if len(index):
            for part in (*self._keys, *self._values):
                part[:, start : len(entries)] = part[:, index]
        self._entries = len(entries)

    def _reserve(self, entries: int) -> None:
        """Make room for so many entries. Mutates: the buffers."""
        if entries <= self._capacity:
            return
        capacity = max(2 * self._capacity, entries, LEAST_CAPACITY)
        shape = (self._kv_heads, capacity, self._size)
        grown: list[list[torch.Tensor]] = []
        for old in (self._keys, self._values):
            new = [torch.empty(shape) for _ in self._layers]
            for target, source in zip(new, old, strict=False):
                target[:, : self._entries] = source[:, : self._entries]
            grown.append(new)
        self._keys, self._values = grown
        # Last: after an interrupt the buffers must not be smaller than this says.
        self._capacity = capacity


def _rotated_half(value: torch.Tensor) -> torch.Tensor:
    """The second factor of rotary embeddings: halves of each head exchanged, one negated."""
    half = value.shape[-1] // 2
    return torch.cat([-value[..., half:], value[..., :half]], dim=-1)


def _norm(norm: Any, value: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(value, norm.weight.shape, norm.weight, norm.variance_epsilon)
