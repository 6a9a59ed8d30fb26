"""Cut the tiles of a prompt on the host, and send those of all its waves in one copy.

The host knows a prompt's routing, because it plans by it. It sorts the pairs of tokens and experts
once for a layer call: a wave is a set of experts, so its pairs lie together in that order.

    experts of pairs 0 to 5   4 1 4 0 1 4
    order                     3 | 1 4 | 0 2 5     pairs of expert 0, of expert 1, of expert 4
    wave 1 -> slot 7, 4 -> slot 2, tiles of 2 pairs
        slot 7: 1 4    slot 2: 0 2    slot 2: 5    slot -1: unused
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]

EVEN = 2
"""Numbers that each table's length is a multiple of.

Triton compiles another kernel for a pointer that is not a multiple of 16 bytes.
"""


class Tiles(NamedTuple):
    """Tiles of one wave, on the device; each belongs to one slot."""

    order: torch.Tensor
    """[at least T * K] int64 pair numbers, sorted by expert; the same for all waves of a call."""
    slots: torch.Tensor
    """[tiles] int64 slot, -1 for a tile without pairs."""
    firsts: torch.Tensor
    """[tiles] int64 place in `order` at which a tile begins."""
    ends: torch.Tensor
    """[tiles] int64 place before which it ends."""
    tokens: int
    """Most pairs of a tile."""


class SortedPairs:
    """The routed pairs of one layer call, sorted by expert, on the host.

    Args:
        ids: [T, K] integers, each at least 0 and less than `experts`.
        experts: number of experts.
    """

    def __init__(self, ids: NDArray[np.integer], experts: int) -> None:
        flat = ids.ravel()
        # Numpy sorts integers of one or two bytes by radix: 15 times as fast as those of eight.
        keys = flat.astype(np.min_scalar_type(experts))
        self.order: Ints = keys.argsort(kind="stable")
        counts = np.bincount(flat, minlength=experts)
        self._ends: Ints = counts.cumsum()
        self._firsts: Ints = self._ends - counts

    def count(self, experts: Sequence[int]) -> int:
        """Pairs of these experts."""
        return int((self._ends[experts] - self._firsts[experts]).sum())

    def cut(self, wave: Mapping[int, int], tokens: int) -> tuple[Ints, Ints, Ints]:
        """(slots, firsts, ends) of a wave's tiles, as in `Tiles`.

        Args:
            wave: expert -> slot.
            tokens: most pairs of a tile.
        """
        experts = list(wave)
        begin, end = self._firsts[experts], self._ends[experts]
        tiles_of_slot = -((begin - end) // tokens)
        last_tiles = tiles_of_slot.cumsum()
        count = int(last_tiles[-1])
        tiles_before = last_tiles - tiles_of_slot
        firsts = np.arange(count) * tokens
        firsts += (begin - tiles_before * tokens).repeat(tiles_of_slot)
        ends = np.minimum(firsts + tokens, end.repeat(tiles_of_slot))
        slots = np.array(list(wave.values()), dtype=np.int64).repeat(tiles_of_slot)
        return slots, firsts, ends


def mean_load(ids: NDArray[np.integer], waves: Sequence[Mapping[int, int]]) -> float:
    """Mean number of tokens of the experts in a call's waves.

    Args:
        ids: [T, K].
        waves: expert -> slot, of experts that are in `ids`; none of them empty.
    """
    experts = [expert for wave in waves for expert in wave]
    counts = np.bincount(ids.ravel())
    return float(counts[experts].mean())


def cut_waves(
    pairs: SortedPairs,
    waves: Sequence[Mapping[int, int]],
    size: Callable[[int, int], int],
    copy: Callable[[torch.Tensor], torch.Tensor],
) -> list[Tiles]:
    """The tiles of a call's waves, which cross to the device in one copy.

    Args:
        waves: expert -> slot of what is computed in one launch; none of them empty.
        size: (pairs, slots) of a wave -> most pairs of its tiles.
        copy: brings int64 numbers to the device.
    """
    tables = [pairs.order]
    tokens = []
    for wave in waves:
        most = size(pairs.count(list(wave)), len(wave))
        tables += pairs.cut(wave, most)
        tokens.append(most)
    order, *rest = _sent(tables, copy)
    found = []
    for index, most in enumerate(tokens):
        slots, firsts, ends = rest[3 * index : 3 * index + 3]
        found.append(Tiles(order, slots, firsts, ends, most))
    return found


def _sent(
    tables: Sequence[Ints], copy: Callable[[torch.Tensor], torch.Tensor]
) -> Sequence[torch.Tensor]:
    """The tables on the device, each as long as `EVEN` asks, and none empty: no grid is.

    What is beyond a table is -1, so that a tile there has no slot.
    """
    lengths = [max(EVEN, len(table) + -len(table) % EVEN) for table in tables]
    packed = np.full(sum(lengths), -1)
    begin = 0
    for table, length in zip(tables, lengths, strict=True):
        packed[begin : begin + len(table)] = table
        begin += length
    return copy(torch.from_numpy(packed)).split(lengths)
