"""A matrix in the quantised form of the GGUF file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class QuantizedMatrix(NamedTuple):
    """One matrix [..., N, M] as stored: rows of quantised blocks."""

    data: NDArray[np.uint8]
    """1-D bytes, contiguous; they must stay mapped as long as a graph reads them."""
    type_name: str
    shape: tuple[int, ...]
    stride: int = 0
    """Bytes between the starts of matrices [N, M] in a stack [E, N, M]; 0 where they are dense."""

    @property
    def nbytes(self) -> int:
        """Stored bytes, those between the matrices included."""
        return int(self.data.size)
