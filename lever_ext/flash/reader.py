"""Direct reads of large blocks by a thread pool, into buffers that are used again and again."""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from hybrimoe_plugin.device.memory import huge_pages
from hybrimoe_plugin.errors import ConfigError, FlashError, did_you_mean
from hybrimoe_plugin.files import open_regular
from lever_ext.flash.format import ALIGNMENT, align

logger = logging.getLogger(__name__)

THROTTLES = {"ufs3.1": 2.1, "ufs4.0": 4.2, "nvme": 7.0}
"""Sequential read bandwidth of device classes as their standards and vendors state it, GB/s."""


@dataclass(frozen=True)
class Throttle:
    """Slow reads down to a stated bandwidth, for reproducible runs; results must carry `label`."""

    gbps: float
    label: str

    @classmethod
    def parse(cls, text: str) -> Throttle:
        """Read a device class of `THROTTLES` or a number of GB/s.

        Raises:
            ConfigError: neither.
        """
        if text in THROTTLES:
            return cls(THROTTLES[text], f"throttled to {text} ({THROTTLES[text]} GB/s)")
        try:
            gbps = float(text)
        except ValueError:
            gbps = 0.0
        if not 0 < gbps < 1000:
            raise ConfigError(
                f"throttle: expected one of {', '.join(THROTTLES)} or GB/s, found {text!r}"
                f"{did_you_mean(text, THROTTLES)}"
            )
        return cls(gbps, f"throttled to {gbps:g} GB/s")


class Buffer:
    """Page-aligned memory outside the page cache: what O_DIRECT needs."""

    def __init__(self, nbytes: int, memory: memoryview | None = None) -> None:
        self.memory = memoryview(huge_pages(align(nbytes))) if memory is None else memory
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        """uint8 [nbytes rounded up to 4096]."""

    @classmethod
    def several(cls, count: int, nbytes: int) -> list[Buffer]:
        """Buffers side by side in one mapping, so that huge pages can span them."""
        if not count:
            return []
        size = align(nbytes)
        memory = memoryview(huge_pages(count * size))
        return [cls(nbytes, memory[place * size : (place + 1) * size]) for place in range(count)]


@dataclass
class ReadCounters:
    """What a reader did since it was opened."""

    nbytes: int = 0
    requests: int = 0
    busy_us: float = 0.0
    """Time with at least one read in flight."""


class FlashReader:
    """Reads byte ranges of one file; several requests at once, in chunks that threads share.

    Args:
        path: the file.
        threads: reads in flight at most.
        chunk_bytes: size of one read; a multiple of 4096.
        throttle: slow down to a bandwidth.
        direct: read past the page cache; falls back with a notice where the file system cannot.

    Raises:
        FlashError: the file cannot be opened.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int = 4,
        chunk_bytes: int = 2 << 20,
        throttle: Throttle | None = None,
        direct: bool = True,
    ) -> None:
        if threads < 1 or chunk_bytes < ALIGNMENT or chunk_bytes % ALIGNMENT:
            raise ConfigError(
                f"flash reads: at least 1 thread and chunks in multiples of {ALIGNMENT}, found "
                f"{chunk_bytes}"
            )
        self.path = Path(path)
        self.chunk_bytes = chunk_bytes
        self.throttle = throttle
        self.counters = ReadCounters()
        self.fd, self.direct = _open(self.path, direct)
        self._state = _identity(self.fd)
        self.size = self._state.size
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy_since = 0.0
        self._paced_until = 0.0
        self._threads = threads
        self._pools = [self._make_pool()]
        """The first is in use; the others are being shut down."""

    def submit(self, offset: int, nbytes: int, buffer: Buffer) -> Future[None]:
        """Read [offset, offset + nbytes) into the buffer's start; both are multiples of 4096.

        Returns:
            a future that ends when all bytes are there, with FlashError if they cannot be read.
        """
        done: Future[None] = Future()
        view = buffer.memory
        starts = range(0, nbytes, self.chunk_bytes)
        with self._lock:
            if self._in_flight == 0:
                self._busy_since = time.perf_counter()
            self._in_flight += 1
        finish = _Countdown(len(starts), lambda error: self._finished(done, nbytes, error))
        for start in starts:
            part = view[start : min(start + self.chunk_bytes, nbytes)]
            self._pools[0].submit(self._read, offset + start, part, finish)
        return done

    def read(self, offset: int, nbytes: int, buffer: Buffer) -> None:
        """`submit` and wait. Raises: FlashError."""
        self.submit(offset, nbytes, buffer).result()

    def check_unchanged(self) -> bool:
        """Whether the file is certainly what it was at the last call, or when it was opened.

        False after something that may also leave the bytes as they are: a change of the name, the
        mode or the times. Programs can set the time of the last write back, but not the one of the
        last change.

        Raises:
            FlashError: the file was written to since it was opened.
        """
        found = _identity(self.fd)
        if (found.size, found.written_ns) != (self._state.size, self._state.written_ns):
            raise FlashError(f"{self.path}: the pack was changed while it is in use; load it again")
        same = found == self._state
        self._state = found
        return same

    def settle(self) -> None:
        """Wait until nothing is read any more, also after an interrupt inside `submit`. Mutates.

        A request that was cut off there has no future to wait for, and may not be counted right.
        """
        self._pools = [self._make_pool(), *self._pools]
        for pool in self._pools[1:]:
            pool.shutdown(wait=True)
        self._pools = self._pools[:1]
        with self._lock:
            self._in_flight = 0

    def close(self) -> None:
        """Wait for reads in flight, then close; a second call does nothing."""
        for pool in self._pools:
            pool.shutdown(wait=True)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _read(self, offset: int, view: memoryview, finish: _Countdown) -> None:
        error: FlashError | None = None
        try:
            self._pace(len(view))
            got = 0
            while got < len(view):
                more = os.preadv(self.fd, [view[got:]], offset + got)
                if not more:
                    error = FlashError(f"{self.path}: the pack ends early: it was truncated")
                    break
                got += more
        except Exception as fault:
            # Whatever it is: whoever waits for these bytes must learn of it.
            reason = getattr(fault, "strerror", None) or fault
            error = FlashError(f"{self.path}: cannot read the pack ({reason})")
        finish(error)

    def _make_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="flash-read")

    def _pace(self, nbytes: int) -> None:
        """Sleep until the throttled device would have delivered the bytes."""
        if self.throttle is None:
            return
        with self._lock:
            begin = max(self._paced_until, time.perf_counter())
            self._paced_until = begin + nbytes / (self.throttle.gbps * 1e9)
            wait = self._paced_until - time.perf_counter()
        if wait > 0:
            time.sleep(wait)

    def _finished(self, done: Future[None], nbytes: int, error: FlashError | None) -> None:
        with self._lock:
            self._in_flight = max(0, self._in_flight - 1)
            self.counters.nbytes += nbytes
            self.counters.requests += 1
            if self._in_flight == 0:
                self.counters.busy_us += (time.perf_counter() - self._busy_since) * 1e6
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


class _Countdown:
    """Calls back when all parts of a request have ended, with the first error among them."""

    def __init__(self, parts: int, then: Callable[[FlashError | None], None]) -> None:
        self._left = parts
        self._then = then
        self._error: FlashError | None = None
        self._lock = threading.Lock()

    def __call__(self, error: FlashError | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            last = self._left == 0
        if last:
            self._then(self._error)


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    try:
        open_regular(path).close()  # raises for a pipe, whose opening would wait forever
        if flag:
            try:
                fd = os.open(path, os.O_RDONLY | flag)
                probe = mmap.mmap(-1, ALIGNMENT)
                os.preadv(fd, [probe], 0)
                return fd, True
            except OSError as error:
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise
                logger.warning(
                    "%s: no direct reads on this file system, reading through the page cache", path
                )
        return os.open(path, os.O_RDONLY), False
    except OSError as error:
        raise FlashError(f"{path}: cannot open the pack ({error.strerror or error})") from None


class _Identity(NamedTuple):
    """What a file system knows of a file's bytes."""

    size: int
    written_ns: int
    changed_ns: int


def _identity(fd: int) -> _Identity:
    state = os.fstat(fd)
    return _Identity(state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def plain_gbps(
    path: str | Path,
    nbytes: int = 256 << 20,
    repeats: int = 1,
    block: int = 8 << 20,
    memory: int = 0,
) -> float:
    """GB/s of plain direct reads of large blocks, one after another: the baseline of any reader.

    Args:
        path: the file.
        nbytes: read at most so much, from the file's start, each time.
        repeats: the fastest counts.
        block: bytes of one read.
        memory: bytes that the blocks go to in turn; at least one block.

    Raises:
        FlashError: the file cannot be read.
    """
    fd, _ = _open(Path(path), True)
    best = 0.0
    try:
        size = min(nbytes, os.fstat(fd).st_size) // ALIGNMENT * ALIGNMENT
        block = max(ALIGNMENT, min(block, size))
        size = size // block * block
        places = max(1, memory // block)
        kept = huge_pages(places * block)
        for page in range(0, len(kept), mmap.PAGESIZE):
            kept[page] = 0  # the kernel hands out pages on first touch
        views = [memoryview(kept)[place * block : (place + 1) * block] for place in range(places)]
        for _ in range(repeats if size else 0):
            begin = time.perf_counter()
            for offset in range(0, size, block):
                os.preadv(fd, [views[offset // block % places]], offset)
            best = max(best, size / (time.perf_counter() - begin) / 1e9)
    except OSError as error:
        raise FlashError(f"{path}: cannot read the pack ({error.strerror or error})") from None
    finally:
        os.close(fd)
    return best
