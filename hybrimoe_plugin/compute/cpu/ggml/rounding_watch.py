"""Notice NaN and infinity that ggml's kernels have rounded away.

Kernels for quantised matrices round activations to small integers, which makes ordinary numbers
of NaN. So all memory that such products read is looked at after each run: by then it has been
written, by the caller or by the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_FACTOR = 1e-30
_SHARED_FACTORS = np.full(1 << 14, _FACTOR, np.float32)
"""The factors for one token; graphs share them, so that they stay in the processor's cache."""


class RoundingWatch:
    """The activations of one graph that products round to integers."""

    def __init__(self) -> None:
        self._activations: list[torch.Tensor] = []
        self._memory: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        """Address -> all memory of some activations, and a small factor for each value of it.

        Their dot product is the fastest look at it: it is finite if and only if all values are,
        since no sum of values times such factors overflows.
        """

    def add(self, activations: torch.Tensor) -> None:
        """Watch the float32 memory of these activations; views share that of their buffer."""
        self._activations.append(activations)
        storage = activations.untyped_storage()
        address = storage.data_ptr()
        if address not in self._memory:
            values = torch.empty(0, dtype=torch.float32, device="cpu").set_(storage)
            self._memory[address] = values.numpy(), _factors(values.numel())

    def spoiled(self) -> bool:
        """Whether some of the memory holds a NaN or an infinity."""
        for values, factors in self._memory.values():
            if not math.isfinite(values.dot(factors)):
                return True
        return False

    def spread_nan(self, rows: int, outputs: Sequence[torch.Tensor]) -> None:
        """Make rows of outputs [..., rows, N] NaN if they are of activations that are not finite.

        With a single row that is all of them, whatever their shapes. Mutates: `outputs`.
        """
        if rows == 1:
            for output in outputs:
                output.fill_(math.nan)
            return
        spoiled = self._spoiled_rows(rows)
        for output in outputs:
            output[..., spoiled, :] = math.nan

    def _spoiled_rows(self, rows: int) -> torch.Tensor:
        """[rows] bool: which rows of any activations [..., rows, M] are not finite."""
        spoiled = torch.zeros(rows, dtype=torch.bool, device="cpu")
        for activations in self._activations:
            finite = activations.isfinite().all(-1).view(-1, rows).all(0)
            spoiled |= ~finite
        return spoiled


def _factors(count: int) -> NDArray[np.float32]:
    if count <= len(_SHARED_FACTORS):
        return _SHARED_FACTORS[:count]
    return np.full(count, _FACTOR, np.float32)
