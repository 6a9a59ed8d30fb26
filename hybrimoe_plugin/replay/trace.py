"""Routing traces: what the routers chose, call by call, as a file that can be replayed.

Format `hybrimoe-trace` 1: a zip archive (stored, not compressed per member beyond deflate) with
`header.json` and, for every chunk of calls, numpy arrays `N/layer` [C] int16, `N/tokens` [C] int32,
`N/ids` [R, K] int16, `N/weights` [R, K] float16, `N/score_ids` and `N/scores` [R, P] int16 and
float16 (the P highest router scores; P = 0 without scores) and `N/predicted` [R, D, K] int16 (ids
for the next D layers, -1 where there is none). R is the sum of `tokens`; rows follow one another
call by call. Chunks are written as the run goes, so memory does not grow; `footer.json` comes last,
so a file without it was cut off.
"""

from __future__ import annotations

import io
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.files import read_regular

FORMAT, VERSION = "hybrimoe-trace", 1
CHUNK_CALLS = 256
MAX_FILE_BYTES = 64 << 20
MAX_MEMORY_BYTES = 384 << 20
"""Memory that a trace may take when it is read: a file of some KiB could unpack to any size."""
_MAX_LISTING_BYTES = 4 << 20
"""The archive's table of contents, of some 60 bytes an array; its entries take ten times as much
memory.
"""
_MAX_JSON_BYTES = 1 << 20
_HEADER = (SyntaxError, tokenize.TokenError)
"""What numpy raises, besides ValueError, for an array whose header is no Python literal."""
_COLUMNS = {
    "layer": np.int16,
    "tokens": np.int32,
    "ids": np.int16,
    "weights": np.float16,
    "score_ids": np.int16,
    "scores": np.float16,
    "predicted": np.int16,
}


@dataclass(frozen=True)
class TraceHeader:
    """Facts about the model and the run."""

    model: str
    layers: int
    """MoE layers."""
    experts: int
    top_k: int
    expert_bytes: int
    source: str
    """Where the routing comes from: a recorded run, a public data set, or a generator with its
    parameters.
    """
    predictions: str = "none"
    """`recorded`, `modelled at recall R`, or `none`."""


class Call(NamedTuple):
    """The routing of one layer call."""

    layer: int
    """Position among the MoE layers."""
    ids: NDArray[np.int64]
    """[T, K]"""
    weights: NDArray[np.float32]
    """[T, K]"""
    scores: NDArray[np.float32] | None
    """[T, E]; only the P highest of each token are kept, the others are 0."""
    predicted: tuple[NDArray[np.int64], ...]
    """[T, K] each, for the next layers, nearest first."""


class Trace(NamedTuple):
    """A whole trace in memory."""

    header: TraceHeader
    calls: list[Call]

    def passes(self) -> Iterator[list[Call]]:
        """Groups of calls that make one forward pass: a call of layer 0 begins a new one."""
        current: list[Call] = []
        for call in self.calls:
            if current and call.layer <= current[-1].layer:
                yield current
                current = []
            current.append(call)
        if current:
            yield current


class TraceWriter:
    """Streams calls to a file; complete after `close`.

    Args:
        score_top: how many router scores per token are kept; 0 for none.

    Raises:
        TraceError: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: TraceHeader, score_top: int = 0
    ) -> None:
        self.header = header
        self.calls = 0
        self._score_top = min(score_top, header.experts)
        self._pending: list[Call] = []
        self._chunk = 0
        try:
            self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        except OSError as error:
            raise TraceError(f"{path}: cannot write the trace ({error.strerror})") from error
        self._put_json("header.json", {"format": FORMAT, "version": VERSION, **asdict(header)})

    def write(self, call: Call) -> None:
        self._pending.append(call)
        self.calls += 1
        if len(self._pending) >= CHUNK_CALLS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._put_json("footer.json", {"calls": self.calls, "chunks": self._chunk})
        self._zip.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        calls, self._pending = self._pending, []
        depth = max(len(call.predicted) for call in calls)
        columns = {
            "layer": np.array([call.layer for call in calls], dtype=np.int16),
            "tokens": np.array([len(call.ids) for call in calls], dtype=np.int32),
            "ids": np.concatenate([call.ids for call in calls]).astype(np.int16),
            "weights": np.concatenate([call.weights for call in calls]).astype(np.float16),
            "predicted": np.concatenate([self._predicted(call, depth) for call in calls]),
        }
        columns["score_ids"], columns["scores"] = self._scores(calls)
        for name, values in columns.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(values), allow_pickle=False)
            self._zip.writestr(f"{self._chunk}/{name}", buffer.getvalue())
        self._chunk += 1

    def _predicted(self, call: Call, depth: int) -> NDArray[np.int16]:
        rows = np.full((len(call.ids), depth, self.header.top_k), -1, dtype=np.int16)
        for distance, ids in enumerate(call.predicted):
            rows[:, distance] = ids
        return rows

    def _scores(self, calls: Sequence[Call]) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
        rows = sum(len(call.ids) for call in calls)
        top = self._score_top if all(call.scores is not None for call in calls) else 0
        if not top:
            return np.zeros((rows, 0), np.int16), np.zeros((rows, 0), np.float16)
        scores = np.concatenate([call.scores for call in calls if call.scores is not None])
        ids = np.argpartition(scores, -top, axis=1)[:, -top:]
        return ids.astype(np.int16), np.take_along_axis(scores, ids, axis=1).astype(np.float16)

    def _put_json(self, name: str, value: object) -> None:
        self._zip.writestr(name, json.dumps(value))


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
            header = _header(_json(archive, "header.json"), path)
            footer = _json(archive, "footer.json")
            calls: list[Call] = []
            left = MAX_MEMORY_BYTES
            for chunk in range(int(footer["chunks"])):
                columns = _columns(archive, chunk, left)
                left -= _memory_bytes(columns, header)
                if left < 0:
                    raise TraceError(
                        f"{path}: takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory: record "
                        f"less"
                    )
                calls.extend(_chunk_calls(columns, chunk, header, path))
            if len(calls) != footer["calls"]:
                raise TraceError(
                    f"{path}: holds {len(calls)} calls, its footer says {footer['calls']}"
                )
    except FileNotFoundError:
        raise TraceError(f"{path}: no such trace file") from None
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        KeyError,
        ValueError,
        TypeError,
        EOFError,
        *_HEADER,
    ) as error:
        raise TraceError(
            f"{path}: cut off, damaged or no trace ({type(error).__name__}: {error})"
        ) from None
    except (
        MemoryError,
        OverflowError,
        RuntimeError,
    ) as error:  # NotImplementedError too: what hostile archives provoke
        raise TraceError(f"{path}: damaged trace ({type(error).__name__}: {error})") from None
    return Trace(header, calls)


def write_trace(
    path: str | os.PathLike[str], header: TraceHeader, calls: Iterable[Call], score_top: int = 0
) -> None:
    """Write a whole trace; see `TraceWriter`."""
    with TraceWriter(path, header, score_top) as writer:
        for call in calls:
            writer.write(call)


def check_header(header: TraceHeader) -> None:
    """Raises: ValueError: a size out of range, or a text that is none."""
    sizes = (header.layers, header.experts, header.top_k)
    if (
        any(type(size) is not int or not 1 <= size < 1 << 15 for size in sizes)
        or header.top_k > header.experts
    ):
        raise ValueError(f"layers, experts, top_k are {sizes}")
    if type(header.expert_bytes) is not int or not 1 <= header.expert_bytes < 1 << 40:
        raise ValueError(f"expert_bytes is {header.expert_bytes!r}")
    if any(type(text) is not str for text in (header.model, header.source, header.predictions)):
        raise ValueError("model, source and predictions must be texts")


def _check_listing(data: bytes) -> None:
    """Raise ValueError for an archive whose table of contents is not small: `zipfile` makes objects
    of all of it.
    """
    end = data.rfind(b"PK\5\6")
    if end < 0 or len(data) < end + 22:
        raise ValueError("no archive")
    nbytes = int.from_bytes(data[end + 12 : end + 16], "little")
    if (
        nbytes > _MAX_LISTING_BYTES or data[end - 20 : end - 16] == b"PK\6\7"
    ):  # the latter: a longer table elsewhere
        raise ValueError(f"its table of contents has more than {_MAX_LISTING_BYTES >> 20} MiB")


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > most:
        raise ValueError(f"{name} unpacks to {info.file_size} bytes, of which {most} may be read")
    return archive.read(info)


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    value = json.loads(_member(archive, name, _MAX_JSON_BYTES))
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


def _columns(archive: zipfile.ZipFile, chunk: int, most: int) -> dict[str, NDArray[Any]]:
    """The arrays of a chunk, of at most so many bytes together."""
    columns = {}
    for name, kind in _COLUMNS.items():
        stored = io.BytesIO(_member(archive, f"{chunk}/{name}", most))
        most -= len(stored.getbuffer())
        if np.lib.format.read_magic(stored) != (1, 0):
            raise ValueError(f"{chunk}/{name} is no array of the kind that is written here")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(stored)
        if by_column or dtype != kind:
            raise ValueError(f"{chunk}/{name} is of type {dtype}, not {np.dtype(kind)}")
        columns[name] = np.frombuffer(stored.getbuffer()[stored.tell() :], dtype).reshape(shape)
    return columns


def _memory_bytes(columns: dict[str, NDArray[Any]], header: TraceHeader) -> int:
    """What the calls of a chunk take: ids are widened, and scores have a place for every expert."""
    rows, scored = len(columns["scores"]), columns["scores"].size > 0
    widened = 8 * (columns["ids"].size + columns["predicted"].size) + 4 * columns["weights"].size
    return widened + 4 * header.experts * rows * scored + 1024 * len(columns["tokens"])


def _chunk_calls(
    columns: dict[str, NDArray[Any]], chunk: int, header: TraceHeader, path: str | os.PathLike[str]
) -> Iterator[Call]:
    ids, predicted = columns["ids"].astype(np.int64), columns["predicted"].astype(np.int64)
    layers, tokens = columns["layer"], columns["tokens"]
    rows = int(tokens.sum(dtype=np.int64))
    shapes = layers.ndim == 1 and layers.shape == tokens.shape and ids.shape == (rows, header.top_k)
    shapes = shapes and columns["weights"].shape == ids.shape and predicted.ndim == 3
    shapes = shapes and predicted.shape[::2] == (rows, header.top_k) and tokens.min(initial=1) >= 1
    shapes = (
        shapes
        and columns["score_ids"].shape == columns["scores"].shape
        and len(columns["scores"]) == rows
    )
    if not shapes:
        raise TraceError(f"{path}: the arrays of chunk {chunk} do not fit together")
    if not (np.isfinite(columns["weights"]).all() and np.isfinite(columns["scores"]).all()):
        raise TraceError(f"{path}: a weight or score of chunk {chunk} is no finite number")
    inside = [(layers, 0, header.layers), (ids, 0, header.experts), (predicted, -1, header.experts)]
    inside.append((columns["score_ids"], 0, header.experts))
    if any(
        values.size and not low <= values.min() <= values.max() < high
        for values, low, high in inside
    ):
        raise TraceError(f"{path}: an expert or layer number of chunk {chunk} is out of range")
    start = 0
    for layer, count in zip(layers.tolist(), tokens.tolist(), strict=True):
        span = slice(start, start + count)
        start += count
        looked = tuple(
            predicted[span, distance]
            for distance in range(predicted.shape[1])
            if (predicted[span, distance] >= 0).all()
        )
        if layer + len(looked) >= header.layers:
            raise TraceError(
                f"{path}: chunk {chunk} predicts experts for layers that the model does not have"
            )
        scores = None
        if columns["scores"].shape[1]:
            scores = np.zeros((count, header.experts), np.float32)
            np.put_along_axis(
                scores, columns["score_ids"][span].astype(np.int64), columns["scores"][span], axis=1
            )
        yield Call(layer, ids[span], columns["weights"][span].astype(np.float32), scores, looked)
