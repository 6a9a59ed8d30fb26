"""Trace files of any known kind."""

from __future__ import annotations

import os
from pathlib import Path

from hybrimoe_plugin.replay.sources.route_csv import read_route_csv
from hybrimoe_plugin.replay.trace import Trace, read_trace


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read our format, or a `route_trace v1` CSV.

    Raises:
        TraceError: neither, or damaged.
    """
    if Path(path).suffix == ".csv":
        return read_route_csv(path)
    return read_trace(path)
