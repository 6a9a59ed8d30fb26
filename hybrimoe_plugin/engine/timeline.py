"""Write a run as a trace for Perfetto or chrome://tracing: tracks for CPU, accelerator and link."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from hybrimoe_plugin.engine.run_limits import RunLimits
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule import simulate
from hybrimoe_plugin.policy.step import Computed, Move

_TRACKS = ("cpu", "accelerator", "link")


def is_timeline(head: bytes) -> bool:
    """Whether a file that begins so was written by `Timeline`."""
    return head.startswith(b'[\n{"ph":"M","name":"thread_name"')


class Timeline:
    """A Trace Event Format file, written as the run goes; complete only after `close`.

    An emulated run shows the simulated times. A measured run knows when a layer call began and
    ended, but not when each expert did: its slices share the measured time in proportion to the
    planned times, and say so.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.closing: list[Callable[[], None]] = []
        """Called by `close`, to stop what draws into it."""
        self._file: IO[str] | None = self.path.open("w", encoding="utf-8")
        self._file.write("[")
        self._first = True
        self._lock = threading.Lock()  # it may be closed while another thread computes
        self._origin_us: float | None = None
        self._limits = RunLimits()
        self._emulated = False
        for track, name in enumerate(_TRACKS):
            self._write(
                {"ph": "M", "name": "thread_name", "pid": 1, "tid": track, "args": {"name": name}}
            )

    def layer_call(self, call: Computed, costs: CostModel, emulated: bool) -> None:
        """Draw one call: its experts on CPU and accelerator, and all that was sent meanwhile."""
        step, ahead, start_us, spent_us = call
        layer = step.layer
        run = simulate(step.plan, step.routed, costs.for_rows(step.few), 0.0)
        with self._lock:
            if self._file is None:
                return
            self._limits.add(layer, start_us, spent_us, run)
            self._emulated |= emulated
        scale = spent_us / run.makespan_us if run.makespan_us > 0 else 1.0
        label = "emulated" if emulated else "measured per call, shared among its experts"
        for piece in run.slices:
            if piece.lane == "link":
                continue
            begin_us = start_us + piece.start_us * scale
            piece_us = (piece.end_us - piece.start_us) * scale
            self._slice(piece.lane, layer, piece.expert, begin_us, piece_us, label)
        self._transfers(step.moves)
        self._transfers(ahead)

    def summary(self) -> str:
        """One line on what limited the run, and where the file is."""
        with self._lock:
            text = self._limits.text()
        label = "emulated times: " if self._emulated else ""
        return f"{label}{text}; written to {self.path} (open it in https://ui.perfetto.dev)"

    def close(self) -> None:
        """Complete the file; a second call does nothing."""
        for stop in self.closing:
            stop()
        with self._lock:
            if self._file is not None:
                self._file.write("\n]\n")
                self._file.close()
                self._file = None

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _transfers(self, moves: Iterable[Move]) -> None:
        """Draw experts crossing the link, at the predicted times."""
        for layer, expert, _, start_us, end_us in moves:
            self._slice("link", layer, expert, start_us, end_us - start_us, "predicted")

    def _slice(
        self, track: str, layer: int, expert: int, start_us: float, spent_us: float, label: str
    ) -> None:
        if self._origin_us is None:
            self._origin_us = start_us
        self._write(
            {
                "ph": "X",
                "name": f"layer {layer} expert {expert}",
                "cat": track,
                "pid": 1,
                "tid": _TRACKS.index(track),
                "ts": round(start_us - self._origin_us, 3),
                "dur": round(spent_us, 3),
                "args": {"layer": layer, "expert": expert, "time": label},
            }
        )

    def _write(self, event: dict[str, object]) -> None:
        # In one piece: an interrupted call leaves whole events.
        line = json.dumps(event, separators=(",", ":"))
        with self._lock:
            if self._file is None:
                return
            self._file.write(("\n" if self._first else ",\n") + line)
            self._first = False
