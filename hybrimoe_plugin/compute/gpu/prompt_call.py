"""One layer call of many tokens on an accelerator: its waves share tiles, rows and one sum.

copied once       the sorted pairs and the tiles of all waves
for each wave     gate and up -> activations, down -> parts
at the end        parts -> the sum over each token's experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch

from hybrimoe_plugin.compute.gpu.kernels.base import (
    PromptKernels,
    PromptWave,
    prompt_rows,
    token_sums,
)
from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout
from hybrimoe_plugin.compute.gpu.kernels.tiles import SortedPairs, cut_waves
from hybrimoe_plugin.compute.gpu.slot_transfers import SlotTransfers


class PromptCall:
    """The waves of one layer call.

    Args:
        kernels: compute them.
        transfers: bring their slots.
        waves: expert -> slot of what is computed in one launch, in order; none of them empty.
        pairs: the call's routing.
        buffer: [slots, slot bytes] uint8.
        layout: of this layer's experts.
        hidden: [T, H] floating point, on the device.
        topk_weights: [T, K] floating point, on the device.
        copy: brings a CPU tensor to the device; the host does not wait.
    """

    def __init__(
        self,
        kernels: PromptKernels,
        transfers: SlotTransfers,
        waves: Sequence[Mapping[int, int]],
        pairs: SortedPairs,
        buffer: torch.Tensor,
        layout: SlotLayout,
        hidden: torch.Tensor,
        topk_weights: torch.Tensor,
        copy: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._kernels = kernels
        self._transfers = transfers
        self._slots = [tuple(wave.values()) for wave in waves]
        self._tokens, top_k = topk_weights.shape
        hidden, topk_weights = hidden.contiguous(), topk_weights.contiguous()

        def size(count: int, slots: int) -> int:
            return kernels.tile_tokens(layout, top_k, count, slots)

        tiles = cut_waves(pairs, waves, size, copy)
        mine = [expert for wave in waves for expert in wave]
        whole = pairs.count(mine) == len(pairs.order)
        activations, self._parts = prompt_rows(hidden, top_k, layout.gate.rows, whole)
        self._waves = []
        for cut in tiles:
            wave = PromptWave(buffer, layout, hidden, topk_weights, cut, activations, self._parts)
            self._waves.append(wave)

    def compute(self, index: int) -> None:
        """Queue one wave. The device, not the host, waits for the slots."""
        wave, slots, transfers = self._waves[index], self._slots[index], self._transfers
        transfers.pump()
        # Triton launches on the current device, which is another where a model lies on several.
        device = wave.hidden.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            layout = transfers.wait_gate_up(slots)
            assert layout == wave.layout, "these slots hold experts of another layer"
            self._kernels.gate_up_prompt(wave)
            transfers.wait_down(slots)
            self._kernels.down_prompt(wave)
            transfers.used(slots)

    def output(self) -> torch.Tensor:
        """[T, H] on the device: the weighted sums over each token's experts in all waves."""
        return token_sums(self._parts, self._tokens)
