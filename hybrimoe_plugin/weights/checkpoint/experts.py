"""The routed experts of one layer in a checkpoint directory: views where they lie as kernels read.

gate_up_proj [E, 2 I, H], down_proj [E, H, I]       views of every other half, and of the whole
experts.E.gate_proj, up_proj, down_proj, or w1...   views, one for each expert
transposed or interleaved (gpt-oss)                 a copy in memory
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hybrimoe_plugin.device.memory import check_host
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.checkpoint.names import Piece
from hybrimoe_plugin.weights.checkpoint.source import ONE_BY_ONE, CheckpointSource
from hybrimoe_plugin.weights.expert_form import ExpertForm
from hybrimoe_plugin.weights.layer_weights import Biases, LayerWeights, Matrix, fused_halves


class CheckpointExperts:
    """Finds the experts of one module.

    Args:
        source: the checkpoint's parameters.
        key: the experts module's qualified name.
        form: what it computes.
    """

    def __init__(self, source: CheckpointSource, key: str, form: ExpertForm) -> None:
        self._source = source
        self._store = source.store
        self._key = key
        self._form = form
        self._inner = (form.intermediate, form.hidden)
        self._outer = (form.hidden, form.intermediate)

    def layer(self, layer: int, top_k: int) -> LayerWeights:
        """The layer's weights.

        Raises:
            WeightsError: something is missing, of another shape, or no floating point.
            BudgetError: they must be copied, and the memory is not there.
        """
        form = self._form
        gate, up = self._gate_and_up()
        down = self._down()
        biases = self._biases() if form.has_biases else None
        return LayerWeights.of(layer, (gate, up, down), biases, self._inner, top_k, form.activation)

    def _gate_and_up(self) -> tuple[Matrix, Matrix]:
        piece = self._piece("gate_up_proj")
        if piece.steps == ONE_BY_ONE[1] and len(piece.by_pattern()) == 2:
            gates, ups = piece.by_pattern()
            return self._apart(gates, self._inner), self._apart(ups, self._inner)
        if not piece.steps and not self._form.is_rearranged:
            return self._fused(piece.tensors[0])
        experts, rows, columns = self._form.experts, *self._inner
        packed = self._loaded("gate_up_proj", (experts, 2 * rows, columns))
        gate, up = self._form.halves(packed, dim=1)
        return _copied(gate), _copied(up)

    def _down(self) -> Matrix:
        piece = self._piece("down_proj")
        if piece.steps == ONE_BY_ONE[0] and len(piece.by_pattern()) == 1:
            return self._apart(piece.by_pattern()[0], self._outer)
        if not piece.steps and not self._form.is_rearranged:
            return self._stacked(piece.tensors[0])
        return _copied(self._loaded("down_proj", (self._form.experts, *self._outer)))

    def _piece(self, name: str) -> Piece:
        piece = self._store.names.pieces.get(f"{self._key}.{name}")
        if piece is None:
            raise WeightsError(f"{self._store.paths[0]}: nothing there for {self._key}.{name}")
        self._store.check_floats(piece.tensors)
        return piece

    def _apart(self, names: Sequence[str], shape: tuple[int, int]) -> Matrix:
        """Experts in tensors of their own."""
        if len(names) != self._form.experts:
            raise WeightsError(
                f"{self._store.paths[0]}: {self._key} has {self._form.experts} experts, found "
                f"{len(names)} of {names[0] if names else 'them'}"
            )
        infos = [self._store.info(name) for name in names]
        for info in infos:
            if info.shape != shape or info.type_name != infos[0].type_name:
                raise WeightsError(
                    f"{self._store.paths[info.file]}: {info.name} is {info.shape} in "
                    f"{info.type_name}, expected {shape} in {infos[0].type_name}"
                )
        views = tuple(self._store.raw(name) for name in names)
        return Matrix(infos[0].type_name, views, self._store.adjacent(names))

    def _fused(self, name: str) -> tuple[Matrix, Matrix]:
        """Views of both halves of one tensor."""
        rows, columns = self._inner
        self._check(name, (self._form.experts, 2 * rows, columns))
        kind = self._store.info(name).type_name
        return fused_halves(self._store.raw(name), self._form.experts, kind)

    def _stacked(self, name: str) -> Matrix:
        self._check(name, (self._form.experts, *self._outer))
        whole = self._store.raw(name)
        views = tuple(whole.reshape(self._form.experts, -1))
        return Matrix(self._store.info(name).type_name, views, whole)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._store.info(name).shape
        if found != shape:
            raise WeightsError(
                f"{self._store.paths[0]}: tensor {name!r} has shape {found}, the model's config "
                f"asks for {shape}"
            )

    def _loaded(self, name: str, shape: tuple[int, int, int]) -> torch.Tensor:
        """A parameter in memory as [E, rows of outputs, columns], in the checkpoint's type."""
        parameter = f"{self._key}.{name}"
        experts, rows, columns = shape
        stored = self._source.stored(parameter)
        check_host(2 * stored.nbytes, f"a rearranged copy of {parameter}")
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        values = torch.from_numpy(np.array(stored.data)).view(dtype[stored.type_name])
        if self._form.is_transposed:
            values = values.view(experts, columns, rows).transpose(1, 2)
        return values.view(shape) if values.is_contiguous() else values

    def _biases(self) -> Biases:
        experts, inner, outer = self._form.experts, self._form.intermediate, self._form.hidden
        both = self._source.load(
            f"{self._key}.gate_up_proj_bias", (experts, 2 * inner), torch.float32
        )
        down = self._source.load(f"{self._key}.down_proj_bias", (experts, outer), torch.float32)
        gate, up = self._form.halves(both, dim=1)
        return Biases(torch.cat((gate, up, down), dim=1).numpy(), inner)


def _copied(values: torch.Tensor) -> Matrix:
    """A stack [E, N, M] in memory of its own."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    whole = values.contiguous().view(torch.uint8).reshape(-1).numpy()
    return Matrix(names[values.dtype], tuple(whole.reshape(len(values), -1)), whole)
