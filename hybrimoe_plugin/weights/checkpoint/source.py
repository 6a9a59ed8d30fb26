"""Reads parameters of a transformers model from a checkpoint, by their transformers names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.checkpoint.names import Piece
from hybrimoe_plugin.weights.parameter_source import LatentSizes, keys_of, values_of
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore

ONE_BY_ONE = (("MergeModulelist",), ("MergeModulelist", "Concatenate"))
"""Conversions that put experts together, and gate before up, without changing a value."""
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_INTEGERS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}


class CheckpointSource:
    """As `ParameterSource`, for a checkpoint directory.

    Args:
        store: the open checkpoint; its `names` must be set.
        config: of the model.
    """

    def __init__(self, store: SafetensorsStore, config: Any) -> None:
        self.store = store
        self.config = config
        self._where = store.paths[0].parent

    def gguf_names(self, name: str) -> tuple[str, ...]:
        """The tensors that make up one parameter.

        Raises:
            WeightsError: no tensor belongs to it.
        """
        return self._piece(name).tensors

    def parts(self, name: str) -> list[str]:
        """The same as a list."""
        return list(self.gguf_names(name))

    def load(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """One parameter on a device.

        Raises:
            WeightsError: missing, of another shape, or no floating point.
        """
        piece = self._piece(name)
        if piece.converter is None and not dtype.is_floating_point:
            return self._integers(piece.tensors[0], shape, dtype).to(device)
        self.store.check_floats(piece.tensors)
        values = {part: self.store.dequantized(part, dtype, device) for part in piece.tensors}
        if piece.converter is None:
            (value,) = values.values()
        else:
            value = self._converted(piece, name, values)
        if tuple(value.shape) != tuple(shape):
            raise self._other_shape(piece, value.shape, name, shape)
        return value

    def expert(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor | None:
        """One expert's part of a stacked parameter; None where only the whole can be made.

        Raises:
            WeightsError: missing, of another shape, or no floating point.
        """
        piece = self._piece(name)
        self.store.check_floats(piece.tensors)
        shape = tuple(self.store.names.model.get_parameter(name).shape)
        if piece.converter is None:
            info = self.store.info(piece.tensors[0])
            if info.shape != shape:
                raise self._other_shape(piece, info.shape, name, shape)
            stored = np.array(self.store.raw(info.name).reshape(shape[0], -1)[expert])
            return torch.from_numpy(stored).view(_DTYPES[info.type_name]).view(shape[1:]).to(dtype)
        if piece.steps not in ONE_BY_ONE:
            return None
        patterns = piece.by_pattern()
        if any(len(names) != shape[0] for names in patterns):
            found = (len(piece.tensors) // len(patterns), *shape[1:])
            raise self._other_shape(piece, found, name, shape)
        parts = [self.store.dequantized(names[expert], dtype) for names in patterns]
        value = torch.cat(parts)
        if tuple(value.shape) != shape[1:]:
            raise self._other_shape(piece, (shape[0], *value.shape), name, shape)
        return value

    def stored(self, name: str) -> QuantizedMatrix:
        """A matrix as its stored bytes; a copy where transformers makes it of others.

        Raises:
            WeightsError: missing, or no floating point.
        """
        piece = self._piece(name)
        self.store.check_floats(piece.tensors)
        info = self.store.info(piece.tensors[0])
        if piece.converter is None:
            return QuantizedMatrix(self.store.raw(info.name), info.type_name, info.shape)
        dtype = _DTYPES[info.type_name]
        values = {part: self.store.dequantized(part, dtype) for part in piece.tensors}
        value = self._converted(piece, name, values).contiguous()
        data = value.view(torch.uint8).reshape(-1).numpy()
        return QuantizedMatrix(data, info.type_name, tuple(value.shape))

    def is_rearranged(self, name: str) -> bool:
        """Whether `stored` or `stored_kv_b` gives a copy."""
        return self._piece(name).converter is not None or name.endswith(".kv_b_proj.weight")

    def stored_kv_b(self, name: str) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """The parts of DeepSeek's kv_b for absorbed attention, in the type of the whole.

        Keys are [heads, R, nope], values [heads, V, R].

        Raises:
            WeightsError: missing, of another shape, or no floating point.
        """
        whole = self.stored(name)
        sizes = LatentSizes.of(self.config)
        if whole.shape != sizes.shape:
            raise WeightsError(
                f"{self._where}: {name} has shape {whole.shape}, the model's config asks for "
                f"{sizes.shape}"
            )
        dtype = _DTYPES[whole.type_name]
        values = torch.from_numpy(np.array(whole.data)).view(dtype).view(sizes.shape)
        keys = keys_of(values.float(), sizes, whole.type_name)
        return keys, values_of(whole.data, sizes, whole.type_name)

    def _other_shape(
        self, piece: Piece, found: Sequence[int], name: str, asked: Sequence[int]
    ) -> WeightsError:
        return WeightsError(
            f"{self._where}: {' and '.join(piece.tensors[:4])} give shape {tuple(found)}, the "
            f"model's config asks for {tuple(asked)} ({name})"
        )

    def _piece(self, name: str) -> Piece:
        pieces = self.store.names.pieces
        if name not in pieces and name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        if name not in pieces:
            raise WeightsError(f"{self._where}: nothing there for {name}")
        return pieces[name]

    def _integers(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Such as a table of experts by token id.

        Raises:
            WeightsError: of another type or shape.
        """
        info = self.store.info(name)
        kind = _INTEGERS.get(info.type_name)
        if kind is None or info.shape != tuple(shape):
            raise WeightsError(
                f"{self._where}: {name} is {info.shape} in {info.type_name}, the model asks for "
                f"{tuple(shape)} in {dtype}"
            )
        values = torch.from_numpy(self.store.read(name)).view(kind).view(info.shape)
        return values.to(dtype)

    def _converted(self, piece: Piece, name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
        try:
            made = piece.convert(values, self.store.names.model)
        except Exception as error:  # transformers' operations raise many kinds
            raise WeightsError(
                f"{self._where}: transformers cannot make {name} of {len(values)} tensors ({error})"
            ) from error
        if name not in made:
            raise WeightsError(f"{self._where}: transformers makes no {name} of its tensors")
        value = made[name]
        found: torch.Tensor = value[0] if isinstance(value, list) else value
        return found
