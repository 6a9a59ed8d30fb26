"""The bytes of a converted tensor: which rows they are made from, a bounded number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.hosts.transformers.convert.methods import Source, row_bytes
from hybrimoe_plugin.weights.dequant import dequantize

_VALUES_AT_A_TIME = 1 << 22


class Piece(NamedTuple):
    """Rows of one source tensor."""

    source: Source
    first: int
    rows: int
    step: int = 1
    """Each row, or every second one."""
    order: NDArray[np.int64] | None = None
    """Numbers of the rows, counted from the first; None where they are in order."""

    def parts(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes, a bounded number of rows at a time."""
        places = np.arange(self.rows) if self.order is None else self.order
        numbers = self.first + self.step * places
        step = max(1, _VALUES_AT_A_TIME // self.source.shape[-1])
        for start in range(0, self.rows, step):
            yield self.source.rows(numbers[start : start + step])


class Biases(NamedTuple):
    """Biases of all experts in float32, where gate and up may take turns."""

    source: Source
    first: int
    step: int

    def parts(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes, at once."""
        stored = torch.from_numpy(self.source.rows(np.arange(self.source.shape[0])).copy())
        values = dequantize(stored.reshape(-1), self.source.type_name, self.source.shape)
        chosen = values[:, self.first :: self.step].contiguous()
        yield chosen.numpy().reshape(-1).view(np.uint8)


class Changed(NamedTuple):
    """A vector in float32, or a tensor whose values files have in another form: all in memory."""

    source: Source
    change: Callable[[torch.Tensor], torch.Tensor]
    """Stored values from the parameter's, float32."""
    dtype: torch.dtype
    """Of what is written."""

    def parts(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes, at once."""
        rows = np.arange(math.prod(self.source.shape[:-1]))
        stored = torch.from_numpy(self.source.rows(rows).copy()).reshape(-1)
        values = dequantize(stored, self.source.type_name, self.source.shape)
        changed = self.change(values.float()).to(self.dtype).contiguous()
        yield changed.view(torch.uint8).reshape(-1).numpy()


class Computed(NamedTuple):
    """A small tensor that the config gives."""

    value: torch.Tensor

    def parts(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes, at once."""
        yield self.value.float().contiguous().numpy().reshape(-1).view(np.uint8)


class Written(NamedTuple):
    """One tensor of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece | Biases | Changed | Computed, ...]

    @property
    def nbytes(self) -> int:
        columns = self.shape[-1] if self.shape else 1
        return math.prod(self.shape) // max(1, columns) * row_bytes(self.type_name, columns)
