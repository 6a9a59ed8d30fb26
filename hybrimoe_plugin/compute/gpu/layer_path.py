"""Where the experts of a layer lie in host memory, and where their parts go in a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from hybrimoe_plugin.compute.gpu.host_bytes import HostBytes
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import LayerWeights

Repacker = Callable[[Sequence[torch.Tensor], torch.Tensor, int], None]
"""Brings several matrices of one expert into slot form.

    arrived: stored bytes of each, uint8, at the start of a buffer that may be longer
    slot:    [slot bytes] uint8 (mutated)
    stream:  handle of the stream to launch on; 0 for the current one, and on the CPU
"""


@runtime_checkable
class WholeRepacks(Protocol):
    """Kernels that bring all of an expert's matrices into slot form in one launch."""

    def repacker(self, parts: tuple[Part, ...]) -> Repacker:
        """For experts with these parts in planes, up to three; to be kept and called often."""
        ...


class _Piece(NamedTuple):
    """One part of a slot: gate, up, down or the biases."""

    source: int
    """Its place in `LayerWeights.stored`."""
    offset: int
    """Bytes from the slot's start."""
    size: int
    planar: bool

    @classmethod
    def of(cls, source: int, part: Part) -> _Piece:
        return cls(source, part.offset, part.size, part.planar)


class LayerPath(NamedTuple):
    """How the experts of one layer get into slots."""

    sources: tuple[tuple[int, ...] | None, ...]
    """For each expert the addresses of its parts; None where one of them must be staged."""
    pieces: tuple[_Piece, ...]
    """In the order in which they cross the link: down comes last."""
    planar: int
    """How many of them are kept in planes."""
    repack: Repacker | None
    """For those; None where there are none."""


def layer_path(
    weights: LayerWeights, layout: SlotLayout, host: HostBytes, kernels: Kernels
) -> LayerPath:
    """The path of one layer's experts; `host` must be prepared.

    Raises:
        BackendError: an expert's parts are not those of the layout.
    """
    sources = tuple(_addresses(weights, e, layout, host) for e in range(weights.spec.experts))
    gate, up, down, *biases = (_Piece.of(place, part) for place, part in enumerate(layout.parts))
    pieces = (gate, up, *biases, down)
    planar = tuple(layout.parts[piece.source] for piece in pieces if piece.planar)
    repack = _repacker(kernels, planar) if planar else None
    return LayerPath(sources, pieces, len(planar), repack)


def _repacker(kernels: Kernels, parts: tuple[Part, ...]) -> Repacker:
    if isinstance(kernels, WholeRepacks):
        return kernels.repacker(parts)

    def one_by_one(arrived: Sequence[torch.Tensor], slot: torch.Tensor, stream: int) -> None:
        with _on_stream(stream, slot.device):
            for part, raw in zip(parts, arrived, strict=True):
                kernels.repack(part, raw[: part.size], slot[part.span])

    return one_by_one


def _on_stream(stream: int, device: torch.device) -> AbstractContextManager[Any]:
    if not stream:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device))


def _addresses(
    weights: LayerWeights, expert: int, layout: SlotLayout, host: HostBytes
) -> tuple[int, ...] | None:
    stored = weights.stored(expert)
    wanted, found = [part.size for part in layout.parts], [part.nbytes for part in stored]
    if wanted != found or not all(part.flags.c_contiguous for part in stored):
        raise BackendError(
            f"layer {weights.layer}, expert {expert}: the slot takes parts of {wanted} bytes, the "
            f"file has {found}"
        )
    addresses = []
    for part in stored:
        address = host.address(part)
        if address is None:
            return None
        addresses.append(address)
    return tuple(addresses)
