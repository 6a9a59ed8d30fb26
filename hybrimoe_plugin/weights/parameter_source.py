"""Which GGUF tensor is which parameter. The `gguf` package's name map does the work; the exceptions
are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf.quants import quantize

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import expert_counts
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
_CORRECTION = ".gate.e_score_correction_bias"


class ParameterSource:
    """Reads parameters of a transformers model, by their names there, from a GGUF store.

    Raises:
        WeightsError: the store's architecture is unknown to `gguf`.
    """

    def __init__(self, store: GGUFStore, config: Any) -> None:
        self.store = store
        self.config = config
        arch = next(
            (key for key, name in MODEL_ARCH_NAMES.items() if name == store.architecture), None
        )
        if arch is None:
            raise WeightsError(
                f"{store.paths[0]}: the gguf package knows no architecture {store.architecture!r}"
            )
        self._map = get_tensor_name_map(arch, config.num_hidden_layers)

    def gguf_names(self, name: str) -> tuple[str, ...]:
        """The GGUF tensors that make up one parameter.

        Raises:
            WeightsError: no tensor of the file belongs to this parameter.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        layer = f"blk.{_layer(name)}"
        if name.endswith(_EXPERTS[0]):
            return f"{layer}.ffn_gate_exps.weight", f"{layer}.ffn_up_exps.weight"
        if name.endswith(_EXPERTS[1]):
            return (f"{layer}.ffn_down_exps.weight",)
        if name.endswith(_CORRECTION):
            return (f"{layer}.exp_probs_b.bias",)
        split = f"{layer}.attn_k_b.weight", f"{layer}.attn_v_b.weight"
        if name.endswith(".self_attn.kv_b_proj.weight") and split[0] in self.store.tensors:
            return split
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise WeightsError(
                f"parameter {name!r} has no counterpart in a {self.store.architecture!r} GGUF"
            )
        return (found,)

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
        parts = [self.store.dequantized(part, dtype, device) for part in self.parts(name)]
        try:
            value = self._arrange(name, parts)
        except (RuntimeError, IndexError) as error:  # torch's for shapes that do not go together
            found = " and ".join(str(tuple(part.shape)) for part in parts)
            raise WeightsError(
                f"{self.store.paths[0]}: {' and '.join(self.gguf_names(name))} of shape {found} "
                f"cannot be made "
                f"{tuple(shape)}, which the model's config asks for ({name})"
            ) from error
        if tuple(value.shape) != tuple(shape):
            raise WeightsError(
                f"{self.store.paths[0]}: {' and '.join(self.gguf_names(name))} give shape "
                f"{tuple(value.shape)}, "
                f"the model's config asks for {tuple(shape)} ({name})"
            )
        return value

    def stored(self, name: str) -> QuantizedMatrix:
        """A matrix as its stored bytes, in the row order of the transformers model.

        Raises:
            WeightsError: missing, or made of several tensors.
        """
        (found,) = self.gguf_names(name)
        info = self.store.info(found)
        data = self.store.raw(found)
        heads = self._rotated_heads(name)
        if heads and (len(info.shape) != 2 or info.shape[0] % (2 * heads)):
            raise WeightsError(
                f"{self.store.paths[0]}: {found!r} of shape {info.shape} cannot be {heads} heads "
                f"({name})"
            )
        if heads:  # rows are whole blocks, so they can be moved as they are
            rows = torch.from_numpy(self.store.read(found)).view(info.shape[0], -1)
            data = unrotate(rows, heads).reshape(-1).numpy()
        return QuantizedMatrix(data, info.type_name, info.shape)

    def stored_kv_b(self, name: str) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """The parts of DeepSeek's kv_b for absorbed attention: keys [heads, R, nope] and values
        [heads, V, R].

        A file that holds kv_b whole gives the values' rows as they are; the keys must be
        transposed, which takes another quantisation, to Q8_0 (float32 where 32 does not divide
        their width).

        Raises:
            WeightsError: missing or of another shape.
        """
        names = self.gguf_names(name)
        config, heads = self.config, self.config.num_attention_heads
        nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
        if len(names) == 2:
            infos = [self.store.info(part) for part in names]
            keys, values = (
                QuantizedMatrix(self.store.raw(info.name), info.type_name, info.shape)
                for info in infos
            )
            return keys, values
        info = self.store.info(names[0])
        if info.shape != (heads * (nope + config.v_head_dim), rank):
            raise WeightsError(
                f"{self.store.paths[0]}: {names[0]!r} has shape {info.shape}, {heads} heads of "
                f"{nope} and "
                f"{config.v_head_dim} values from {rank} ask for "
                f"{(heads * (nope + config.v_head_dim), rank)}"
            )
        rows = self.store.read(names[0]).reshape(heads, nope + config.v_head_dim, -1)
        value_rows = np.ascontiguousarray(rows[:, nope:]).reshape(-1)
        plain = (
            self.store.dequantized(names[0])
            .view(heads, -1, rank)[:, :nope]
            .transpose(1, 2)
            .contiguous()
            .numpy()
        )
        kind = "Q8_0" if nope % 32 == 0 and info.type_name != "F32" else "F32"
        packed = quantize(plain, GGMLQuantizationType[kind]).view(np.uint8).reshape(-1)
        return (
            QuantizedMatrix(packed, kind, (heads, rank, nope)),
            QuantizedMatrix(value_rows, info.type_name, (heads, config.v_head_dim, rank)),
        )

    def _rotated_heads(self, name: str) -> int:
        """Heads of a projection whose rows llama-architecture files rotate, else 0."""
        if self.store.architecture == "llama" and ".self_attn." in name:
            if ".q_proj." in name:
                return int(self.config.num_attention_heads)
            if ".k_proj." in name:
                return int(self.config.num_key_value_heads)
        return 0

    def parts(self, name: str) -> list[str]:
        """The tensors to read for a parameter; older files keep each expert in a tensor of its own.

        Raises:
            WeightsError: no tensor of the file belongs to this parameter.
        """
        names: list[str] = []
        for found in self.gguf_names(name):
            old = found.replace("_exps.weight", ".0.weight")
            if found not in self.store.tensors and old in self.store.tensors:
                count = min(expert_counts(self.config)[0], len(self.store.tensors))
                names += [
                    found.replace("_exps.weight", f".{expert}.weight") for expert in range(count)
                ]
            else:
                names.append(found)
        return names

    def _arrange(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        if name.endswith(_EXPERTS):
            if parts[0].ndim == 2:  # one tensor per expert: all gates, then all ups
                half = len(parts) // (2 if name.endswith(_EXPERTS[0]) else 1)
                parts = [
                    torch.stack(parts[start : start + half]) for start in range(0, len(parts), half)
                ]
            return torch.cat(parts, dim=1)
        if len(parts) == 2:  # kv_b split for absorbed attention: k_b is stored transposed
            keys, values = parts[0].transpose(1, 2), parts[1]
            return torch.cat((keys, values), dim=1).reshape(-1, keys.shape[2])
        value = parts[0]
        heads = self._rotated_heads(name)
        if heads:
            return unrotate(value, heads)
        if name.endswith(".shared_expert_gate.weight") and value.ndim == 1:
            return value[None]
        return value


def rotate(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K from transformers' order (halves) to that of llama-architecture GGUF files
    (pairs).
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def unrotate(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `rotate`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
