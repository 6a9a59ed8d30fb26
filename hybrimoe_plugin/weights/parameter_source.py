"""Reads parameters of a transformers model from a GGUF store, by their transformers names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_names import (
    DOWN,
    DOWN_BIAS,
    EXPERTS,
    GATE_UP_BIAS,
    GGUFNames,
    NameMap,
    from_pairs,
    layer_number,
)
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import expert_counts
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_FLOATS = ("F32", "F16", "BF16")
_KV_B = ".self_attn.kv_b_proj.weight"


class ParameterSource:
    """The parameters of one model.

    Args:
        store: the open weights.
        config: of the model, as transformers has it.
        names: how files of the model's family deviate from the usual names and layout.

    Raises:
        WeightsError: the `gguf` package has no map for the store's architecture.
    """

    def __init__(self, store: GGUFStore, config: Any, names: GGUFNames | None = None) -> None:
        self.store = store
        self.config = config
        self._names = names or GGUFNames()
        self._where = store.paths[0]
        self._map = NameMap(self._names, store.architecture, config.num_hidden_layers)

    def gguf_names(self, name: str) -> tuple[str, ...]:
        """The GGUF tensors that make up one parameter.

        Raises:
            WeightsError: no tensor of the file belongs to this parameter.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        layer = f"blk.{layer_number(name)}"
        if name.endswith(EXPERTS):
            return self._experts(name, layer)
        joined = self._names.joined_tensors(name)
        if joined:
            return joined
        parts = kv_b_parts(name, self.store)
        if parts:
            return parts
        found = self._map.tensor(name)
        if found is None:
            raise WeightsError(
                f"parameter {name!r} has no counterpart in a {self.store.architecture!r} GGUF"
            )
        return (found,)

    def parts(self, name: str) -> list[str]:
        """The tensors to read for a parameter; older files keep each expert in a tensor of its own.

        Raises:
            WeightsError: no tensor of the file belongs to this parameter.
        """
        found: list[str] = []
        for tensor in self.gguf_names(name):
            if self._one_per_expert(tensor):
                experts = min(expert_counts(self.config)[0], len(self.store.tensors))
                found += [_of_expert(tensor, expert) for expert in range(experts)]
            else:
                found.append(tensor)
        return found

    def load(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """One parameter, dequantised on `device`, in the layout of the transformers model.

        Raises:
            WeightsError: missing or of another shape.
        """
        names = self.parts(name)
        # What is computed with, such as a gain less 1, would lose all its digits in 16 bits.
        read = dtype if self._names.change(name) is None else torch.float32
        parts = [self.store.dequantized(part, read, device) for part in names]
        tensors = " and ".join(self.gguf_names(name))
        wanted = f"{tuple(shape)}, which the model's config asks for ({name})"
        try:
            value = self._arrange(name, parts).to(dtype)
        except (RuntimeError, IndexError) as error:  # torch's for shapes that do not go together
            found = " and ".join(str(tuple(part.shape)) for part in parts)
            raise WeightsError(
                f"{self._where}: {tensors} of shape {found} cannot be made {wanted}"
            ) from error
        if tuple(value.shape) != tuple(shape):
            raise WeightsError(
                f"{self._where}: {tensors} give shape {tuple(value.shape)}, "
                f"the model's config asks for {tuple(shape)} ({name})"
            )
        return value

    def stored(self, name: str) -> QuantizedMatrix:
        """A matrix as its stored bytes, in the row order of the transformers model.

        Raises:
            WeightsError: missing, or made of several tensors.
        """
        tensors = self.gguf_names(name)
        order = self._names.row_order(name, self.config)
        if len(tensors) > 1 or order is not None:
            whole = self._joined(name, tensors)
            return whole if order is None else _reordered(whole, order)
        (tensor,) = tensors
        heads = self._names.heads_in_pairs(name, self.config)
        if heads == 0:
            return self._unchanged(tensor)
        info = self.store.info(tensor)
        shape = info.shape
        if len(shape) != 2 or shape[0] % (2 * heads):
            raise WeightsError(
                f"{self._where}: {tensor!r} of shape {shape} cannot be {heads} heads ({name})"
            )
        # A row is a whole number of blocks, so rows can change places as they are stored.
        data = torch.from_numpy(self.store.read(tensor))
        rows = data.view(shape[0], -1)
        halves = from_pairs(rows, heads)
        return QuantizedMatrix(halves.reshape(-1).numpy(), info.type_name, shape)

    def is_rearranged(self, name: str) -> bool:
        """Whether `stored` or `stored_kv_b` gives a copy, as rows must change places."""
        if name.endswith(_KV_B):
            return len(self.gguf_names(name)) == 1
        if self._names.joined_tensors(name) or self._names.row_order(name, self.config) is not None:
            return True
        return bool(self._names.heads_in_pairs(name, self.config))

    def stored_kv_b(self, name: str) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """The parts of DeepSeek's kv_b for absorbed attention.

        Keys are [heads, R, nope], values [heads, V, R].

        A file that holds kv_b whole gives the values' rows as they are; the keys must be
        transposed, which takes another quantisation, to Q8_0 (float32 where 32 does not divide
        their width). Floating-point types stay as they are.

        Raises:
            WeightsError: missing or of another shape.
        """
        names = self.gguf_names(name)
        if len(names) == 2:
            keys, values = map(self._unchanged, names)
            return keys, values
        (whole,) = names
        sizes = LatentSizes.of(self.config)
        info = self.store.info(whole)
        if info.shape != sizes.shape:
            raise WeightsError(
                f"{self._where}: {whole!r} has shape {info.shape}, {sizes.heads} heads of "
                f"{sizes.nope} and {sizes.value} values from {sizes.rank} ask for {sizes.shape}"
            )
        keys = keys_of(self.store.dequantized(whole), sizes, info.type_name)
        values = values_of(self.store.read(whole), sizes, info.type_name)
        return keys, values

    def _experts(self, name: str, layer: str) -> tuple[str, ...]:
        """The tensors of one of the four parameters that a layer's routed experts may have."""
        kind = "bias" if name.endswith("_bias") else "weight"
        if name.endswith((DOWN, DOWN_BIAS)):
            return (f"{layer}.ffn_down_exps.{kind}",)
        fused = f"{layer}.ffn_gate_up_exps.{kind}"
        if fused in self.store.tensors:
            return (fused,)
        return f"{layer}.ffn_gate_exps.{kind}", f"{layer}.ffn_up_exps.{kind}"

    def _joined(self, name: str, tensors: tuple[str, ...]) -> QuantizedMatrix:
        """A matrix from those of several tensors, one behind the other."""
        parts = [self._unchanged(tensor) for tensor in tensors]
        kinds = {part.type_name for part in parts}
        widths = {part.shape[1:] for part in parts}
        if len(kinds) > 1 or len(widths) > 1 or any(len(part.shape) != 2 for part in parts):
            raise WeightsError(
                f"{self._where}: {' and '.join(tensors)} differ in type or width, and are one "
                f"matrix of the model ({name})"
            )
        rows = sum(part.shape[0] for part in parts)
        data = np.concatenate([part.data for part in parts])
        return QuantizedMatrix(data, parts[0].type_name, (rows, *parts[0].shape[1:]))

    def _unchanged(self, tensor: str) -> QuantizedMatrix:
        info = self.store.info(tensor)
        data = self.store.raw(tensor)
        return QuantizedMatrix(data, info.type_name, info.shape)

    def _one_per_expert(self, tensor: str) -> bool:
        """Whether the file keeps the experts of a stacked tensor in tensors of their own."""
        tensors = self.store.tensors
        return tensor not in tensors and _of_expert(tensor, 0) in tensors

    def _arrange(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """The parameter from its dequantised parts."""
        if name.endswith(EXPERTS):
            return self._arrange_experts(name, parts)
        change = self._names.change(name)
        order = self._names.row_order(name, self.config)
        if change is not None or order is not None or self._names.joined_tensors(name):
            value = torch.cat(parts)
            value = value if order is None else value[order]
            return value if change is None else change.restored(value, self.config)
        if len(parts) == 2:
            return _whole_kv_b(*parts)
        (value,) = parts
        heads = self._names.heads_in_pairs(name, self.config)
        if heads:
            return from_pairs(value, heads)
        if name.endswith(".shared_expert_gate.weight") and value.ndim == 1:
            return value[None]
        return value

    def _arrange_experts(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        if name.endswith((GATE_UP_BIAS, DOWN_BIAS)):
            stacks = parts
        else:
            one = name.endswith(DOWN) or (len(parts) == 1 and parts[0].ndim == 3)
            stacks = _stacks(parts, 1 if one else 2)
        if not self._names.interleaved_experts:
            return torch.cat(stacks, dim=1)
        if len(stacks) == 2:
            # gate 0, up 0, gate 1, up 1, ...
            stacks = [torch.stack(stacks, dim=2).flatten(1, 2)]
        (whole,) = stacks
        return whole.transpose(1, 2).contiguous() if whole.ndim == 3 else whole


def kv_b_parts(name: str, store: GGUFStore) -> tuple[str, ...]:
    """The two tensors of DeepSeek's kv_b where a file has it in parts; none otherwise.

    One of them is stored transposed, so that they do not stack up to the matrix.
    """
    parts = tuple(f"blk.{layer_number(name)}.attn_{part}_b.weight" for part in "kv")
    return parts if name.endswith(_KV_B) and parts[0] in store.tensors else ()


class LatentSizes(NamedTuple):
    """Sizes of DeepSeek's latent attention."""

    heads: int
    rank: int
    nope: int
    """Dimensions of a key without rotary embedding."""
    value: int

    @classmethod
    def of(cls, config: Any) -> LatentSizes:
        return cls(
            config.num_attention_heads,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.v_head_dim,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole kv_b."""
        return self.heads * (self.nope + self.value), self.rank


def keys_of(kv_b: torch.Tensor, sizes: LatentSizes, stored: str) -> QuantizedMatrix:
    """[heads, R, nope] from the whole kv_b in floating point.

    In the stored type if that is a floating point one, else in Q8_0, or in F32 where 32 does not
    divide the keys' width.
    """
    heads, rank, nope, _ = sizes
    keys = kv_b.view(heads, -1, rank)[:, :nope]
    transposed = keys.transpose(1, 2).contiguous()
    kind = stored if stored in _FLOATS else "Q8_0"
    if kind == "Q8_0" and nope % 32:
        kind = "F32"
    packed = quantize(transposed.numpy(), GGMLQuantizationType[kind])
    data = packed.view(np.uint8).reshape(-1)
    return QuantizedMatrix(data, kind, (heads, rank, nope))


def values_of(kv_b: NDArray[np.uint8], sizes: LatentSizes, stored: str) -> QuantizedMatrix:
    """[heads, V, R] as stored, from the bytes of the whole kv_b."""
    heads, rank, nope, width = sizes
    rows = kv_b.reshape(heads, nope + width, -1)
    values = np.ascontiguousarray(rows[:, nope:])
    return QuantizedMatrix(values.reshape(-1), stored, (heads, width, rank))


def _reordered(stored: QuantizedMatrix, order: torch.Tensor) -> QuantizedMatrix:
    """A copy with other rows first; a row is a whole number of blocks."""
    rows = stored.data.reshape(stored.shape[0], -1)[order.numpy()]
    return QuantizedMatrix(rows.reshape(-1), stored.type_name, (len(order), *stored.shape[1:]))


def _of_expert(tensor: str, expert: int) -> str:
    """The tensor of one expert in older files, from the name of the stacked one."""
    return tensor.replace("_exps.weight", f".{expert}.weight")


def _stacks(parts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """`count` stacks [E, rows, columns], from as many tensors or from one for each expert.

    Of tensors for each expert, all gates come before all ups.
    """
    if parts[0].ndim != 2:
        return parts
    experts = len(parts) // count
    stacks = []
    for index in range(count):
        start = index * experts
        own = parts[start : start + experts]
        stacks.append(torch.stack(own))
    return stacks


def _whole_kv_b(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """kv_b [heads * (nope + V), R] from its parts for absorbed attention.

    Args:
        keys: stored transposed, [heads, R, nope].
        values: [heads, V, R].
    """
    rows = torch.cat((keys.transpose(1, 2), values), dim=1)
    rank = rows.shape[2]
    return rows.reshape(-1, rank)
