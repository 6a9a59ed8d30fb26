"""Reading trace files, which may be damaged or hostile."""

from __future__ import annotations

import io
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.files import read_regular
from hybrimoe_plugin.replay.trace.data import Call, Trace, TraceHeader, check_header
from hybrimoe_plugin.replay.trace.format import COLUMNS, FOOTER, FORMAT, HEADER, VERSION

MAX_FILE_BYTES = 64 << 20
MAX_MEMORY_BYTES = 384 << 20
"""Memory that a trace may take when it is read: a file of some KiB could unpack to any size."""
MAX_LISTING_BYTES = 4 << 20
"""The archive's table of contents, of some 60 bytes an array; its entries take ten times as much
memory.
"""
MAX_JSON_BYTES = 1 << 20
CALL_BYTES = 1024
"""Memory of one call besides its arrays' values."""
NOT_A_TRACE = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    # What numpy raises, besides ValueError, for an array whose header is no Python literal.
    SyntaxError,
    tokenize.TokenError,
)
"""What files that are cut off, damaged or no traces provoke."""
HOSTILE = (MemoryError, OverflowError, RuntimeError)
"""What hostile archives provoke; RuntimeError includes NotImplementedError."""
# The record that ends a zip archive, and the one before it where the table of contents is large.
END_MARK, END_BYTES = b"PK\5\6", 22
LARGE_MARK, LARGE_BYTES = b"PK\6\7", 20

Columns = dict[str, NDArray[Any]]
"""The arrays of one chunk, by name."""


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file whole.

    Raises:
        TraceError: missing, cut off, damaged, of another version, too large to be held in memory,
            or no trace at all.
    """
    try:
        data = read_regular(path, MAX_FILE_BYTES)
        _check_listing(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _read(archive, path)
    except FileNotFoundError:
        raise TraceError(f"{path}: no such trace file") from None
    except NOT_A_TRACE as error:
        reason = f"{type(error).__name__}: {error}"
        raise TraceError(f"{path}: cut off, damaged or no trace ({reason})") from None
    except HOSTILE as error:
        raise TraceError(f"{path}: damaged trace ({type(error).__name__}: {error})") from None


def _read(archive: zipfile.ZipFile, path: str | os.PathLike[str]) -> Trace:
    header = _header(_json(archive, HEADER), path)
    footer = _json(archive, FOOTER)
    calls: list[Call] = []
    left = MAX_MEMORY_BYTES
    for number in range(int(footer["chunks"])):
        columns = _columns(archive, number, left)
        left -= _memory_bytes(columns, header)
        if left < 0:
            mib = MAX_MEMORY_BYTES >> 20
            raise TraceError(f"{path}: takes more than {mib} MiB of memory: record less")
        calls.extend(_Chunk(columns, number, header, path).calls())
    if len(calls) != footer["calls"]:
        raise TraceError(f"{path}: holds {len(calls)} calls, its footer says {footer['calls']}")
    return Trace(header, calls)


def _check_listing(data: bytes) -> None:
    """Check that the table of contents is small: `zipfile` makes objects of all of it.

    Raises:
        ValueError: it is not, or there is none.
    """
    end = data.rfind(END_MARK)
    if end < 0 or len(data) < end + END_BYTES:
        raise ValueError("no archive")
    nbytes = int.from_bytes(data[end + 12 : end + 16], "little")
    large = end - LARGE_BYTES
    is_elsewhere = data[large : large + len(LARGE_MARK)] == LARGE_MARK
    if nbytes > MAX_LISTING_BYTES or is_elsewhere:
        raise ValueError(f"its table of contents has more than {MAX_LISTING_BYTES >> 20} MiB")


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > most:
        raise ValueError(f"{name} unpacks to {info.file_size} bytes, of which {most} may be read")
    return archive.read(info)


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    value = json.loads(_member(archive, name, MAX_JSON_BYTES))
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value


def _header(data: dict[str, Any], path: str | os.PathLike[str]) -> TraceHeader:
    if data.pop("format", None) != FORMAT:
        raise TraceError(f"{path}: not a {FORMAT} file")
    version = data.pop("version", None)
    if version != VERSION:
        raise TraceError(f"{path}: trace version {version!r}, this program reads {VERSION}")
    header = TraceHeader(**data)
    check_header(header)
    return header


def _columns(archive: zipfile.ZipFile, number: int, most: int) -> Columns:
    """The arrays of a chunk, of at most so many bytes together."""
    columns = {}
    for name, kind in COLUMNS.items():
        member = f"{number}/{name}"
        stored = io.BytesIO(_member(archive, member, most))
        most -= len(stored.getbuffer())
        if np.lib.format.read_magic(stored) != (1, 0):
            raise ValueError(f"{member} is no array of the kind that is written here")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(stored)
        if by_column or dtype != kind:
            raise ValueError(f"{member} is of type {dtype}, not {np.dtype(kind)}")
        values = stored.getbuffer()[stored.tell() :]
        columns[name] = np.frombuffer(values, dtype).reshape(shape)
    return columns


def _memory_bytes(columns: Columns, header: TraceHeader) -> int:
    """What the calls of a chunk take: ids are widened, and scores have a place for every expert."""
    ids = columns["ids"].size + columns["predicted"].size
    scores = 0
    if columns["scores"].size:
        scores = header.experts * len(columns["scores"])
    floats = columns["weights"].size + scores
    return 8 * ids + 4 * floats + CALL_BYTES * len(columns["tokens"])


class _Chunk:
    """The calls of one chunk, checked against the header and one another."""

    def __init__(
        self, columns: Columns, number: int, header: TraceHeader, path: str | os.PathLike[str]
    ) -> None:
        self._columns = columns
        self._number = number
        self._header = header
        self._path = path
        self._ids = columns["ids"].astype(np.int64)
        self._predicted = columns["predicted"].astype(np.int64)

    def calls(self) -> Iterator[Call]:
        """Raises: TraceError."""
        self._check()
        columns = self._columns
        layers, counts = columns["layer"].tolist(), columns["tokens"].tolist()
        start = 0
        for layer, count in zip(layers, counts, strict=True):
            rows = slice(start, start + count)
            start += count
            weights = columns["weights"][rows].astype(np.float32)
            predicted = self._predictions(layer, rows)
            yield Call(layer, self._ids[rows], weights, self._scores(rows), predicted)

    def _check(self) -> None:
        columns, number = self._columns, self._number
        if not self._shapes_fit():
            self._fail(f"the arrays of chunk {number} do not fit together")
        for name in ("weights", "scores"):
            if not np.isfinite(columns[name]).all():
                self._fail(f"a weight or score of chunk {number} is no finite number")
        experts = self._header.experts
        for values, low, high in (
            (columns["layer"], 0, self._header.layers),
            (self._ids, 0, experts),
            (self._predicted, -1, experts),
            (columns["score_ids"], 0, experts),
        ):
            if values.size and not low <= values.min() <= values.max() < high:
                self._fail(f"an expert or layer number of chunk {number} is out of range")

    def _shapes_fit(self) -> bool:
        columns, top_k = self._columns, self._header.top_k
        layers, tokens, scores = columns["layer"], columns["tokens"], columns["scores"]
        rows = int(tokens.sum(dtype=np.int64))
        if layers.ndim != 1 or layers.shape != tokens.shape or tokens.min(initial=1) < 1:
            return False
        if self._ids.shape != (rows, top_k) or columns["weights"].shape != (rows, top_k):
            return False
        if self._predicted.ndim != 3 or self._predicted.shape[::2] != (rows, top_k):
            return False
        if scores.ndim != 2 or len(scores) != rows:
            return False
        return columns["score_ids"].shape == scores.shape

    def _predictions(self, layer: int, rows: slice) -> tuple[NDArray[np.int64], ...]:
        """[T, K] for each of the next layers that was predicted."""
        found = []
        for distance in range(self._predicted.shape[1]):
            ids = self._predicted[rows, distance]
            if (ids >= 0).all():
                found.append(ids)
        if layer + len(found) >= self._header.layers:
            self._fail(
                f"chunk {self._number} predicts experts for layers that the model does not have"
            )
        return tuple(found)

    def _scores(self, rows: slice) -> NDArray[np.float32] | None:
        """[T, E], 0 for experts whose score was not kept."""
        kept = self._columns["scores"][rows]
        if not kept.shape[1]:
            return None
        scores = np.zeros((len(kept), self._header.experts), np.float32)
        ids = self._columns["score_ids"][rows].astype(np.int64)
        np.put_along_axis(scores, ids, kept, axis=1)
        return scores

    def _fail(self, what: str) -> NoReturn:
        raise TraceError(f"{self._path}: {what}")
