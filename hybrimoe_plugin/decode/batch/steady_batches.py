"""Which numbers of sequences have graphs, and from when on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.decode.batch.batch_layer import BatchLayer
from hybrimoe_plugin.decode.layer_call import EagerLayer

BATCHES = (2, 4, 8, 16)
"""Numbers of sequences whose steps are captured."""

STEADY = 4
"""Steps of the same number of sequences before it is captured.

To capture a layer and to prove it costs the host about as much as three more eager steps. So at
worst, if the number changes right behind that, steps take twice the time that they would have taken
eagerly.
"""


class SteadyBatches:
    """A layer's calls that are not one token's: `BatchLayer` where the calls are steady.

    Graphs and a KV cache are kept for one number of sequences at a time, the last that was
    captured: a cache for 16 sequences takes 16 times the memory of one. Prompts, and steps of one
    sequence or of numbers that are not in `BATCHES`, leave them as they are.

    Args:
        make: makes the layer's graphs for a number of sequences.

    Attributes:
        batch: the graphs that are kept; None before the first ones.
    """

    def __init__(self, eager: EagerLayer, make: Callable[[int], BatchLayer]) -> None:
        self.batch: BatchLayer | None = None
        self._eager = eager
        self._make = make
        self._refused: set[int] = set()
        """Numbers of sequences that run eagerly from now on."""
        self._counted = 0
        """The number of sequences of the last steps that had no graphs."""
        self._steps = 0
        """How many of them there were since steps of any other of `BATCHES`."""

    @property
    def captured(self) -> bool:
        return self.captured_sequences > 0

    @property
    def captured_sequences(self) -> int:
        """The number of sequences whose steps are replayed; 0 if there is none."""
        batch = self.batch
        return batch.state.batch if batch is not None and batch.captured else 0

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = None if args else self._batch_of(hidden_states)
        if batch is None:
            return self._eager(hidden_states, *args, **kwargs)
        output = batch(hidden_states, **kwargs)
        if batch.refused:  # its memory is given back
            self._refused.add(batch.state.batch)
            self.batch = None
        return output

    def _batch_of(self, hidden_states: torch.Tensor) -> BatchLayer | None:
        """The graphs for hidden states [R, T, H]; None if there are to be none."""
        sequences, tokens, _ = hidden_states.shape
        if tokens != 1 or sequences not in BATCHES or sequences in self._refused:
            return None
        if self.batch is not None and self.batch.state.batch == sequences:
            self._steps = 0
            return self.batch
        if sequences != self._counted:
            self._steps = 0
            self._counted = sequences
        self._steps += 1
        if self._steps <= STEADY:
            return None
        self.batch = None  # first: its memory may be needed
        self.batch = made = self._make(sequences)
        return made
