"""The plain twin of the kernels on split planes, telling the fake streams what it touches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fake_streams import LazyStreams

from hybrimoe_plugin.compute.activation import activate
from hybrimoe_plugin.compute.gpu.kernels.base import PromptWave, SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import (
    Part,
    SlotLayout,
    from_planes,
    slot_layout,
    to_planes,
)
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.weights.dequant import dequantize


class WatchedKernels(TorchKernels):
    """The plain twin on split planes, telling the streams what it touches."""

    def __init__(self, streams: LazyStreams) -> None:
        self._streams = streams

    def layout(self, spec: Any) -> SlotLayout:
        return slot_layout(spec, planar=True)

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        self._streams.touch(raw, write=False)
        self._streams.touch(target, write=True)
        target.copy_(torch.from_numpy(to_planes(raw.numpy(), part.type_name)))

    def gate_up(self, call: SlotCall) -> Any:
        self._streams.log.append("stage 1")
        for slot in call.slots:
            for part in (call.layout.gate, call.layout.up):
                self._touch(call, slot, part)
        return super().gate_up(self._joined(call))

    def down(self, call: SlotCall, activations: Any) -> torch.Tensor:
        self._streams.log.append("stage 2")
        for slot in call.slots:
            self._touch(call, slot, call.layout.down)
        return super().down(self._joined(call), activations)

    def _touch(self, call: SlotCall, slot: int, part: Part) -> None:
        self._streams.touch(
            call.buffer[slot, part.offset : part.offset + part.size], write=False, compute=True
        )

    @staticmethod
    def _joined(call: SlotCall) -> SlotCall:
        """The same call with blocks as GGML has them."""
        buffer = call.buffer.clone()
        for slot in call.slots:
            for part in call.layout.parts:
                if part.planar:
                    span = slice(part.offset, part.offset + part.size)
                    buffer[slot, span] = from_planes(call.buffer[slot, span], part.type_name)
        return call._replace(buffer=buffer)


class WatchedPrompts(WatchedKernels):
    """The same, which computes prompts in tiles that the host has cut."""

    def tiles(self, layout: SlotLayout, tokens: int, load: float) -> bool:
        return True

    def tile_tokens(self, layout: SlotLayout, top_k: int, pairs: int, slots: int) -> int:
        return 2

    def gate_up_prompt(self, wave: PromptWave) -> None:
        self._streams.log.append("stage 1")
        layout, top_k = wave.layout, wave.topk_weights.shape[1]
        for slot, first, pairs in self._tiles(wave, layout.gate, layout.up):
            states = wave.hidden[pairs // top_k]
            gate, up = (states @ self._matrix(wave, part, slot).T for part in layout.parts[:2])
            rows = activate(gate, up, layout.activation)
            wave.activations[first : first + len(pairs)] = rows

    def down_prompt(self, wave: PromptWave) -> None:
        self._streams.log.append("stage 2")
        for slot, first, pairs in self._tiles(wave, wave.layout.down):
            rows = wave.activations[first : first + len(pairs)]
            shares = wave.topk_weights.flatten()[pairs, None]
            wave.parts[pairs] = rows @ self._matrix(wave, wave.layout.down, slot).T * shares

    def _tiles(self, wave: PromptWave, *parts: Part) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(slot, first place, pairs) of each tile that is used."""
        tiles = wave.tiles
        for slot, first, end in zip(*(table.tolist() for table in tiles[1:4]), strict=True):
            if slot >= 0:
                for part in parts:
                    span = wave.buffer[slot, part.span]
                    self._streams.touch(span, write=False, compute=True)
                yield slot, first, tiles.order[first:end]

    @staticmethod
    def _matrix(wave: PromptWave, part: Part, slot: int) -> torch.Tensor:
        raw = wave.buffer[slot, part.span]
        if part.planar:
            raw = from_planes(raw, part.type_name)
        return dequantize(raw, part.type_name, (part.rows, part.columns)).to(wave.hidden.dtype)


def watched_copy(streams: LazyStreams) -> Any:
    """A replacement for the lane's copy that tells the streams what it writes."""

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        streams.touch(target, write=True)
        target.copy_(source)

    return copy
