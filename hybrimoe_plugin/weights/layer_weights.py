"""The routed experts of one layer as stored bytes: checked views into the mapped file, never
copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.weights.gguf_store import GGUFStore, dequantize_bytes

Bytes = NDArray[np.uint8]


class Matrix(NamedTuple):
    """One projection of all experts of a layer."""

    type_name: str
    experts: tuple[Bytes, ...]
    """Stored bytes of each expert's matrix, 1-D uint8."""
    stacked: Bytes | None
    """The same bytes as one contiguous view; None where the file keeps experts in tensors of their
    own.
    """


@dataclass(frozen=True)
class LayerWeights:
    """Gate and up are [I, H], down is [H, I] per expert."""

    layer: int
    """Decoder layer, as in the file's names."""
    spec: ExpertSpec
    """With this layer's own types and bytes: layers of one file may differ."""
    gate: Matrix
    up: Matrix
    down: Matrix

    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        return self.gate, self.up, self.down

    def dequantized(
        self, expert: int, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(gate [I, H], up [I, H], down [H, I]) of one expert, fresh tensors on the CPU."""
        return split_expert(
            [matrix.experts[expert] for matrix in self.matrices()], self.spec, dtype
        )


def split_expert(
    parts: Sequence[Bytes], spec: ExpertSpec, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dequantise one expert's stored (gate, up, down) bytes."""
    inner, outer = (spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate)
    gate = dequantize_bytes(parts[0], spec.gate_type, inner, "gate").to(dtype)
    up = dequantize_bytes(parts[1], spec.up_type, inner, "up").to(dtype)
    return gate, up, dequantize_bytes(parts[2], spec.down_type, outer, "down").to(dtype)


def layer_weights(
    store: GGUFStore, layer: int, *, experts: int, hidden: int, intermediate: int, top_k: int
) -> LayerWeights:
    """Find one layer's experts, stacked (`ffn_*_exps`) or, in older files, one tensor each
    (`ffn_*.{i}`).

    Raises:
        WeightsError: a tensor is missing or does not have the expected shape.
    """
    if not 1 <= top_k <= experts:
        raise WeightsError(f"{store.paths[0]}: a token cannot choose {top_k} of {experts} experts")
    inner, outer = (intermediate, hidden), (hidden, intermediate)
    gate = _matrix(store, layer, "gate", experts, inner)
    up = _matrix(store, layer, "up", experts, inner)
    down = _matrix(store, layer, "down", experts, outer)
    spec = ExpertSpec(
        hidden=hidden,
        intermediate=intermediate,
        experts=experts,
        top_k=top_k,
        gate_type=gate.type_name,
        up_type=up.type_name,
        down_type=down.type_name,
        gate_bytes=_matrix_bytes(gate.type_name, inner),
        up_bytes=_matrix_bytes(up.type_name, inner),
        down_bytes=_matrix_bytes(down.type_name, outer),
    )
    return LayerWeights(layer, spec, gate, up, down)


def _matrix(
    store: GGUFStore, layer: int, part: str, experts: int, shape: tuple[int, int]
) -> Matrix:
    stacked_name = f"blk.{layer}.ffn_{part}_exps.weight"
    if stacked_name in store.tensors:
        info = store.info(stacked_name)
        _check_shape(stacked_name, info.shape, (experts, *shape))
        stacked = store.raw(stacked_name)
        return Matrix(info.type_name, tuple(stacked.reshape(experts, -1)), stacked)
    first = f"blk.{layer}.ffn_{part}.0.weight"
    if first not in store.tensors:
        raise WeightsError(f"{store.paths[0]}: neither {stacked_name!r} nor {first!r} is there")
    if experts > len(store.tensors):
        raise WeightsError(
            f"{store.paths[0]}: holds {len(store.tensors)} tensors, too few for {experts} experts"
        )
    names = [f"blk.{layer}.ffn_{part}.{expert}.weight" for expert in range(experts)]
    infos = [store.info(name) for name in names]
    for name, info in zip(names, infos, strict=True):
        _check_shape(name, info.shape, shape)
        if info.type_name != infos[0].type_name:
            raise WeightsError(
                f"{store.paths[0]}: {name!r} is {info.type_name}, {names[0]!r} is "
                f"{infos[0].type_name}: "
                "the experts of a layer must share one type"
            )
    return Matrix(infos[0].type_name, tuple(store.raw(name) for name in names), None)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise WeightsError(
            f"tensor {name!r} has shape {found}, the model's config asks for {expected}"
        )


def _matrix_bytes(type_name: str, shape: tuple[int, int]) -> int:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return shape[0] * shape[1] // block * block_bytes


def expert_counts(config: Any) -> tuple[int, int]:
    """(number of routed experts, their intermediate size) under the names that model families use.

    Raises:
        ConfigError: the config describes no routed experts.
    """
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 0:
            return count, int(
                getattr(config, "moe_intermediate_size", None) or config.intermediate_size
            )
    raise ConfigError(f"{type(config).__name__}: no number of routed experts in the model's config")
