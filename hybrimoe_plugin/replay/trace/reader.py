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

Path = str | os.PathLike[str]
Object = dict[str, Any]
"""A JSON object."""
Columns = dict[str, NDArray[Any]]
"""The arrays of one chunk, by name."""
Ids = NDArray[np.int64]


def read_trace(path: Path) -> Trace:
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


def _read(archive: zipfile.ZipFile, path: Path) -> Trace:
    """The calls of all chunks, chunk by chunk, so that too many are noticed in time."""
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
        chunk = _Chunk(columns, number, header, path)
        calls.extend(chunk.calls())
    stated = footer["calls"]
    if len(calls) != stated:
        raise TraceError(f"{path}: holds {len(calls)} calls, its footer says {stated}")
    return Trace(header, calls)


def _check_listing(data: bytes) -> None:
    """Check that the table of contents is small: `zipfile` makes objects of all of it.

    Raises:
        ValueError: it is not, or there is none.
    """
    end = data.rfind(END_MARK)
    if end < 0:
        raise ValueError("no archive")
    record = data[end : end + END_BYTES]
    if len(record) < END_BYTES:
        raise ValueError("no archive")
    # Bytes 12 to 15 are the size of the table of contents; a larger one is listed elsewhere.
    nbytes = int.from_bytes(record[12:16], "little")
    before = data[end - LARGE_BYTES : end]
    if nbytes > MAX_LISTING_BYTES or before.startswith(LARGE_MARK):
        raise ValueError(f"its table of contents has more than {MAX_LISTING_BYTES >> 20} MiB")


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """One member, unpacked.

    Raises:
        ValueError: it has more than `most` bytes.
    """
    info = archive.getinfo(name)
    if info.file_size > most:
        raise ValueError(f"{name} unpacks to {info.file_size} bytes, of which {most} may be read")
    return archive.read(info)


def _json(archive: zipfile.ZipFile, name: str) -> Object:
    text = _member(archive, name, MAX_JSON_BYTES)
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value


def _header(data: Object, path: Path) -> TraceHeader:
    """The header, checked. Mutates `data`."""
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
        nbytes = len(stored.getbuffer())
        most -= nbytes
        if np.lib.format.read_magic(stored) != (1, 0):
            raise ValueError(f"{member} is no array of the kind that is written here")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(stored)
        if by_column or dtype != kind:
            raise ValueError(f"{member} is of type {dtype}, not {np.dtype(kind)}")
        values = stored.getbuffer()[stored.tell() :]
        columns[name] = np.frombuffer(values, dtype).reshape(shape)
    return columns


def _memory_bytes(columns: Columns, header: TraceHeader) -> int:
    """Memory of a chunk's calls: ids are widened, and scores have a place for every expert."""
    ids = columns["ids"].size + columns["predicted"].size
    floats = columns["weights"].size
    scores = columns["scores"]
    if scores.size:
        floats += header.experts * len(scores)
    calls = len(columns["tokens"])
    return 8 * ids + 4 * floats + CALL_BYTES * calls


class _Chunk:
    """The calls of one chunk, checked against the header and one another."""

    def __init__(self, columns: Columns, number: int, header: TraceHeader, path: Path) -> None:
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
        layers = columns["layer"].tolist()
        counts = columns["tokens"].tolist()
        start = 0
        for layer, count in zip(layers, counts, strict=True):
            rows = slice(start, start + count)
            start += count
            ids = self._ids[rows]
            weights = columns["weights"][rows].astype(np.float32)
            predicted = self._predictions(layer, rows)
            scores = self._scores(rows)
            yield Call(layer, ids, weights, scores, predicted)

    def _check(self) -> None:
        """Raises: TraceError for arrays that do not fit, or numbers out of range."""
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
            if not values.size:
                continue
            if values.min() < low or values.max() >= high:
                self._fail(f"an expert or layer number of chunk {number} is out of range")

    def _shapes_fit(self) -> bool:
        """Whether all arrays have as many rows as the calls have tokens."""
        columns = self._columns
        layers, tokens = columns["layer"], columns["tokens"]
        if layers.ndim != 1 or layers.shape != tokens.shape:
            return False
        if tokens.min(initial=1) < 1:
            return False
        rows = int(tokens.sum(dtype=np.int64))
        chosen = (rows, self._header.top_k)
        if self._ids.shape != chosen:
            return False
        if columns["weights"].shape != chosen:
            return False
        if self._predicted.ndim != 3:
            return False
        if self._predicted.shape[::2] != chosen:
            return False
        scores = columns["scores"]
        if scores.ndim != 2 or len(scores) != rows:
            return False
        return columns["score_ids"].shape == scores.shape

    def _predictions(self, layer: int, rows: slice) -> tuple[Ids, ...]:
        """[T, K] for each of the next layers that was predicted."""
        found = []
        depth = self._predicted.shape[1]
        for distance in range(depth):
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
        ids = self._columns["score_ids"][rows].astype(np.int64)
        tokens, top = kept.shape
        if not top:
            return None
        scores = np.zeros((tokens, self._header.experts), np.float32)
        np.put_along_axis(scores, ids, kept, axis=1)
        return scores

    def _fail(self, what: str) -> NoReturn:
        raise TraceError(f"{self._path}: {what}")
