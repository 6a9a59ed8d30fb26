"""The routed experts of one layer as stored bytes: checked views into the mapped file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.core import SILU, Activation, ExpertSpec
from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.weights.gguf_store import GGUFStore, dequantize_bytes

Bytes = NDArray[np.uint8]


class Matrix(NamedTuple):
    """One projection of all experts of a layer."""

    type_name: str
    experts: tuple[Bytes, ...]
    """Stored bytes of each expert's matrix, 1-D uint8."""
    stacked: Bytes | None
    """The same bytes as one contiguous view; None if they do not lie one behind the other."""
    spread: Bytes | None = None
    """Where gate and up are one tensor: the view from the first expert's bytes to the last one's.

    Experts are `stride` bytes apart in it.
    """

    @property
    def stride(self) -> int:
        """Bytes from the start of one expert's matrix to that of the next, where `spread` is."""
        return 2 * self.experts[0].size


@dataclass(frozen=True)
class Biases:
    """What the experts of a layer add to each product.

    They are kept together, so that an expert's biases cross the link as one piece:

        | gate [I] | up [I] | down [H] |    float32, for each of E experts
    """

    packed: NDArray[np.float32]
    """[E, 2 I + H]"""
    intermediate: int
    """I"""

    @property
    def gate_up(self) -> torch.Tensor:
        """[E, 2 I] float32 on the CPU: gate's, then up's."""
        return torch.from_numpy(self.packed[:, : 2 * self.intermediate])

    @property
    def down(self) -> torch.Tensor:
        """[E, H] float32 on the CPU."""
        return torch.from_numpy(self.packed[:, 2 * self.intermediate :])

    def stored(self, expert: int) -> Bytes:
        """One expert's, as 1-D bytes."""
        return self.packed[expert].view(np.uint8)


@dataclass(frozen=True)
class LayerWeights:
    """The three projections of a layer.

    For each expert gate is [I, H], up [I, H] and down [H, I].
    """

    layer: int
    """Decoder layer, as in the file's names."""
    spec: ExpertSpec
    """With this layer's own types and bytes: layers of one file may differ."""
    gate: Matrix
    up: Matrix
    down: Matrix
    biases: Biases | None = None
    """None in families whose experts have none."""

    @classmethod
    def of(
        cls,
        layer: int,
        matrices: tuple[Matrix, Matrix, Matrix],
        biases: Biases | None,
        inner: tuple[int, int],
        top_k: int,
        activation: Activation,
    ) -> LayerWeights:
        """From gate, up and down, where gate and up have the shape `inner`, [I, H]."""
        gate, up, down = matrices
        intermediate, hidden = inner
        spec = ExpertSpec(
            hidden=hidden,
            intermediate=intermediate,
            experts=len(gate.experts),
            top_k=top_k,
            gate_type=gate.type_name,
            up_type=up.type_name,
            down_type=down.type_name,
            gate_bytes=gate.experts[0].size,
            up_bytes=up.experts[0].size,
            down_bytes=down.experts[0].size,
            activation=activation,
            bias_bytes=0 if biases is None else biases.packed[0].nbytes,
        )
        return cls(layer, spec, gate, up, down, biases)

    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        return self.gate, self.up, self.down

    def stored(self, expert: int) -> tuple[Bytes, ...]:
        """Bytes of one expert: gate, up and down, and its biases where there are any."""
        matrices = tuple(matrix.experts[expert] for matrix in self.matrices())
        if self.biases is None:
            return matrices
        return (*matrices, self.biases.stored(expert))

    def dequantized(
        self, expert: int, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(gate [I, H], up [I, H], down [H, I]) of one expert, fresh tensors on the CPU.

        Raises:
            WeightsError: a type cannot be dequantised.
        """
        spec = self.spec
        inner = (spec.intermediate, spec.hidden)
        outer = (spec.hidden, spec.intermediate)
        gate = dequantize_bytes(self.gate.experts[expert], spec.gate_type, inner, "gate")
        up = dequantize_bytes(self.up.experts[expert], spec.up_type, inner, "up")
        down = dequantize_bytes(self.down.experts[expert], spec.down_type, outer, "down")
        return gate.to(dtype), up.to(dtype), down.to(dtype)


def layer_weights(
    store: GGUFStore,
    layer: int,
    *,
    experts: int,
    hidden: int,
    intermediate: int,
    top_k: int,
    activation: Activation = SILU,
    has_biases: bool = False,
) -> LayerWeights:
    """Find one layer's experts in the file.

    They are stacked (`ffn_*_exps`, where gate and up may be one tensor, `ffn_gate_up_exps`) or, in
    older files, one tensor each (`ffn_*.{expert}`).

    Raises:
        WeightsError: a tensor is missing or does not have the expected shape, or the file has
            biases where the model has none.
    """
    if not 1 <= top_k <= experts:
        raise WeightsError(f"{store.paths[0]}: a token cannot choose {top_k} of {experts} experts")
    inner = (intermediate, hidden)
    outer = (hidden, intermediate)
    # Each checks the shape of its tensors.
    gate, up = _gate_and_up(store, layer, experts, inner)
    down = _matrix(store, layer, "down", experts, outer)
    biases = _biases(store, layer, experts, intermediate, hidden) if has_biases else None
    if not has_biases:
        _check_no_biases(store, layer)
    return LayerWeights.of(layer, (gate, up, down), biases, inner, top_k, activation)


def _gate_and_up(
    store: GGUFStore, layer: int, experts: int, shape: tuple[int, int]
) -> tuple[Matrix, Matrix]:
    """Both projections; as views of every other half where the file keeps them in one tensor.

    | gate of expert 0 | up of expert 0 | gate of expert 1 | up of expert 1 | ...
    """
    name = f"blk.{layer}.ffn_gate_up_exps.weight"
    if name not in store.tensors:
        gate = _matrix(store, layer, "gate", experts, shape)
        return gate, _matrix(store, layer, "up", experts, shape)
    info = store.info(name)
    rows, columns = shape
    _check_shape(name, info.shape, (experts, 2 * rows, columns))
    return fused_halves(store.raw(name), experts, info.type_name)


def fused_halves(whole: Bytes, experts: int, type_name: str) -> tuple[Matrix, Matrix]:
    """(gate, up) as views of one tensor [E, 2 I, H], in which each expert's gate comes first."""
    halves = whole.reshape(experts, 2, -1)
    size = halves.shape[2]
    gate = Matrix(type_name, tuple(halves[:, 0]), None, whole[:-size])
    return gate, Matrix(type_name, tuple(halves[:, 1]), None, whole[size:])


def _biases(store: GGUFStore, layer: int, experts: int, inner: int, outer: int) -> Biases:
    parts = []
    for part, size in (("gate", inner), ("up", inner), ("down", outer)):
        name = f"blk.{layer}.ffn_{part}_exps.bias"
        _check_shape(name, store.info(name).shape, (experts, size))
        parts.append(store.dequantized(name, torch.float32))
    return Biases(torch.cat(parts, dim=1).numpy(), inner)


def _check_no_biases(store: GGUFStore, layer: int) -> None:
    for part in ("gate", "up", "gate_up", "down"):
        name = f"blk.{layer}.ffn_{part}_exps.bias"
        if name in store.tensors:
            raise WeightsError(
                f"{store.paths[0]}: holds {name!r}, but experts of this model have no biases"
            )


def _matrix(
    store: GGUFStore, layer: int, part: str, experts: int, shape: tuple[int, int]
) -> Matrix:
    """One projection of all experts; `shape` is that of one expert's matrix."""
    stacked_name = f"blk.{layer}.ffn_{part}_exps.weight"
    if stacked_name in store.tensors:
        info = store.info(stacked_name)
        _check_shape(stacked_name, info.shape, (experts, *shape))
        stacked = store.raw(stacked_name)
        return Matrix(info.type_name, tuple(stacked.reshape(experts, -1)), stacked)
    first = f"blk.{layer}.ffn_{part}.0.weight"
    if first not in store.tensors:
        raise WeightsError(f"{store.paths[0]}: holds neither tensor {stacked_name!r} nor {first!r}")
    return _single_experts(store, f"blk.{layer}.ffn_{part}", experts, shape)


def _single_experts(store: GGUFStore, prefix: str, experts: int, shape: tuple[int, int]) -> Matrix:
    """A projection that the file keeps in one tensor for each expert."""
    path = store.paths[0]
    tensors = len(store.tensors)
    if experts > tensors:
        raise WeightsError(f"{path}: holds {tensors} tensors, too few for {experts} experts")
    infos = [store.info(f"{prefix}.{expert}.weight") for expert in range(experts)]
    first = infos[0]
    for info in infos:
        _check_shape(info.name, info.shape, shape)
        if info.type_name != first.type_name:
            raise WeightsError(
                f"{path}: {info.name!r} is {info.type_name}, {first.name!r} is {first.type_name}: "
                "the experts of a layer must share one type"
            )
    stored = tuple(store.raw(info.name) for info in infos)
    return Matrix(first.type_name, stored, store.adjacent([info.name for info in infos]))


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise WeightsError(
            f"tensor {name!r} has shape {found}, the model's config asks for {expected}"
        )


def expert_counts(config: Any) -> tuple[int, int]:
    """(number of routed experts, their intermediate size) under the names that model families use.

    Raises:
        ConfigError: the config describes no routed experts.
    """
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 0:
            size = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
            return count, int(size)
    raise ConfigError(f"{type(config).__name__}: the config states no number of routed experts")


def has_experts(config: Any) -> bool:
    """Whether a config describes routed experts."""
    try:
        return expert_counts(config)[0] > 0
    except ConfigError:
        return False


def chosen_experts(config: Any) -> int:
    """Experts of one token, K, under the names that model families use.

    Raises:
        ConfigError: the config does not say.
    """
    for name in (
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_k",
    ):
        count = getattr(config, name, None)
        if isinstance(count, list) and len(set(count)) == 1:
            count = count[0]
        if isinstance(count, int) and count > 0:
            return count
    raise ConfigError(f"{type(config).__name__}: the config does not state the experts of a token")
