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

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return int(self.data.size)
