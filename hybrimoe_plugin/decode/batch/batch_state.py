"""A step's inputs at fixed addresses where it has one token of each of several sequences."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention.decode_attention import (
    AttentionKernel,
    AttentionShape,
    MaskedAttention,
)
from hybrimoe_plugin.decode.decode_state import DecodeState
from hybrimoe_plugin.device.cuda_graphs import Capture


class BatchState(DecodeState):
    """What the captured layers of one device share in steps of several sequences.

    In transformers' caches the sequences of a batch have the same number of entries. Shorter ones
    are padded on the left, and the mask hides their padding:

        sequence 0   | t0 | t1 | t2 | t3 | new |
        sequence 1   |    |    | t0 | t1 | new |       t0 has the position 0

    So all new tokens go to one entry of the cache, `position`; what differs by sequence is in the
    mask and in the position embeddings [batch, 1, D]. Attention is torch's, under that mask.

    Args:
        batch: the number of sequences.
    """

    def __init__(self, capture: Capture, device: torch.device, batch: int) -> None:
        super().__init__(capture, device)
        self.batch = batch
        self._mask: torch.Tensor | None = None
        """The step's, as the model gave it."""

    def set_step(
        self, held: int, position_embeddings: Any, mask: torch.Tensor | None = None
    ) -> bool:
        """As for one sequence.

        Args:
            mask: [batch or 1, 1, 1, held + 1] as `MaskedAttention.plan` takes it.
        """
        # A new pass has new embeddings: its mask may be the same tensor with other entries.
        if mask is not self._mask or position_embeddings is not self._given_as:
            self._held = -1  # first: an interrupt leaves a step that is not known
            self._mask = mask
        return super().set_step(held, position_embeddings)

    def set_dummy_step(self, position: int) -> None:
        """As for one sequence; no entry is hidden."""
        self._held = -1
        self._mask = None
        super().set_dummy_step(position)

    def takes_mask(self, mask: Any, held: int) -> bool:
        """Whether a step's mask is of the kind that `set_step` takes."""
        if mask is None or (mask is self._mask and held == self._held):
            return True
        if not isinstance(mask, torch.Tensor) or mask.device != self.device:
            return False
        known = mask.dtype == torch.bool or mask.is_floating_point()
        return known and mask.shape in ((self.batch, 1, 1, held + 1), (1, 1, 1, held + 1))

    def _new_kernel(self, shape: AttentionShape, plain: bool) -> AttentionKernel:
        return MaskedAttention(shape, self.device, self.batch)

    def _plan(self, kernel: AttentionKernel, position: int) -> None:
        assert isinstance(kernel, MaskedAttention), "this state makes no others"
        kernel.plan(position, self._mask)
