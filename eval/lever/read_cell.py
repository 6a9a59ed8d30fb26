"""How fast the pack is read, against plain reads of the same file."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from eval.lever.cell import BLANK, Row
from eval.lever.lab import Lab
from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.flash.reader import Buffer, plain_gbps

BUFFERS = 3
"""Of a target's stream."""
READ_BYTES = 384 << 20


@dataclass(frozen=True)
class ReadCell:
    """Our reader against plain large-block direct reads of the same file, in turns.

    The plain reads go to as much memory as the stream's three buffers, as every reader's must whose
    bytes are to be used; beside them, for comparison, into one 8 MiB block again and again, which
    stays in the processor's cache.
    """

    name: str
    repeats: int = 12

    def run(self, lab: Lab) -> Iterator[Row]:
        """One row for each reader and turn, then two for the shares that follow."""
        lab.close()
        path = lab.pack("dense")
        pack = FlashPack.open(path)
        kept = BUFFERS * block_memory(pack.blocks("layer"))
        readers: dict[str, Callable[[], float]] = {
            "reader": lambda: stream_gbps(pack, READ_BYTES),
            "plain direct read": lambda: plain_gbps(path, READ_BYTES, memory=kept),
            "plain direct read, one block": lambda: plain_gbps(path, READ_BYTES),
        }
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        names = list(readers)
        for turn in range(self.repeats):
            for name in names if turn % 2 else reversed(names):
                speed = readers[name]()
                speeds[name].append(speed)
                yield _row(name, speed)
        pack.close()
        # Harmonic means: all bytes over all the time.
        ours, plain, block = [statistics.harmonic_mean(found) for found in speeds.values()]
        yield _row("read share", ours / plain)
        yield _row("read share, one block", ours / block)


def _row(what: str, value: float) -> Row:
    return {**BLANK, "target": "dense", "tree": what, "value": round(value, 3)}


def stream_gbps(pack: FlashPack, nbytes: int) -> float:
    """GB/s of layer blocks read through three buffers, as a target's stream does.

    Nothing is computed meanwhile.
    """
    blocks = pack.blocks("layer")
    buffers = deque(Buffer.several(3, block_memory(blocks)))
    for buffer in buffers:
        buffer.bytes.zero_()  # the kernel hands out pages on first touch
    waiting, done = deque[Any](), 0
    begin = time.perf_counter()
    for block in blocks:
        if done >= nbytes:
            break
        buffer = buffers.popleft()
        waiting.append(pack.submit(block, buffer))
        buffers.append(buffer)
        done += block.nbytes
        if len(waiting) == 3:
            waiting.popleft().result()
    while waiting:
        waiting.popleft().result()
    return done / (time.perf_counter() - begin) / 1e9
