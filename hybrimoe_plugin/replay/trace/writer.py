"""Writing trace files as a run goes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.replay.trace.data import Call, TraceHeader
from hybrimoe_plugin.replay.trace.format import COLUMNS, FOOTER, FORMAT, HEADER, VERSION

CHUNK_CALLS = 256
"""Calls that wait in memory."""


Path = str | os.PathLike[str]


class TraceWriter:
    """Streams calls to a file; complete after `close`.

    Args:
        score_top: how many router scores per token are kept; 0 for none.

    Raises:
        TraceError: the file cannot be written.
    """

    def __init__(self, path: Path, header: TraceHeader, score_top: int = 0) -> None:
        self.header = header
        self.calls = 0
        self._score_top = min(score_top, header.experts)
        self._pending: list[Call] = []
        self._chunk = 0
        try:
            self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        except OSError as error:
            raise TraceError(f"{path}: cannot write the trace ({error.strerror})") from error
        facts = {"format": FORMAT, "version": VERSION, **asdict(header)}
        self._put_json(HEADER, facts)

    def write(self, call: Call) -> None:
        """Add one call; it is in the file once its chunk is full, or after `close`."""
        self._pending.append(call)
        self.calls += 1
        if len(self._pending) >= CHUNK_CALLS:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer."""
        self._flush()
        footer = {"calls": self.calls, "chunks": self._chunk}
        self._put_json(FOOTER, footer)
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
        """Write the calls that wait as one chunk."""
        calls = self._pending
        if not calls:
            return
        self._pending = []
        score_ids, scores = self._scores(calls)
        layers = [call.layer for call in calls]
        tokens = [len(call.ids) for call in calls]
        columns: dict[str, NDArray[Any]] = {
            "layer": np.array(layers),
            "tokens": np.array(tokens),
            "ids": np.concatenate([call.ids for call in calls]),
            "weights": np.concatenate([call.weights for call in calls]),
            "predicted": self._predicted(calls),
            "score_ids": score_ids,
            "scores": scores,
        }
        for name, values in columns.items():
            narrow = values.astype(COLUMNS[name])
            stored = np.ascontiguousarray(narrow)
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, stored, allow_pickle=False)
            member = f"{self._chunk}/{name}"
            self._zip.writestr(member, buffer.getvalue())
        self._chunk += 1

    def _predicted(self, calls: Sequence[Call]) -> NDArray[np.int16]:
        """[R, D, K], -1 where a call has fewer predictions than others."""
        depth = max(len(call.predicted) for call in calls)
        parts = []
        for call in calls:
            shape = (len(call.ids), depth, self.header.top_k)
            rows = np.full(shape, -1, dtype=np.int16)
            for distance, ids in enumerate(call.predicted):
                rows[:, distance] = ids
            parts.append(rows)
        return np.concatenate(parts)

    def _scores(self, calls: Sequence[Call]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids and values of the highest scores, [R, P]; P = 0 if a call has none."""
        shown = [call.scores for call in calls if call.scores is not None]
        if not self._score_top or len(shown) < len(calls):
            rows = sum(len(call.ids) for call in calls)
            nothing = np.zeros((rows, 0))
            return nothing, nothing
        scores = np.concatenate(shown)
        top = self._score_top
        order = np.argpartition(scores, -top, axis=1)
        ids = order[:, -top:]
        values = np.take_along_axis(scores, ids, axis=1)
        return ids, values

    def _put_json(self, name: str, value: object) -> None:
        text = json.dumps(value)
        self._zip.writestr(name, text)


def write_trace(path: Path, header: TraceHeader, calls: Iterable[Call], score_top: int = 0) -> None:
    """Write a whole trace; see `TraceWriter`.

    Raises:
        TraceError: the file cannot be written.
    """
    with TraceWriter(path, header, score_top) as writer:
        for call in calls:
            writer.write(call)
