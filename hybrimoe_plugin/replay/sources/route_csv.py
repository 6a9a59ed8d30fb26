"""Public routing data: `route_trace v1` CSV files."""

from __future__ import annotations

import csv
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.files import read_regular
from hybrimoe_plugin.replay.trace import Call, Trace, TraceHeader, check_header

MAX_BYTES = 4 << 20
MAX_FACTS = 4096
"""Characters of a comment line that are searched for facts."""
FIRST_LINE = "# route_trace v1"
COLUMNS = ("phase", "step", "layer", "slot", "expert", "weight")
PHASE, STEP, LAYER, SLOT, EXPERT, WEIGHT = range(len(COLUMNS))
PROMPT, ANSWER = 0, 1
"""Values of the phase."""
UNSOUND = (
    OSError,
    UnicodeDecodeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
)
"""What damaged files provoke."""

Rows = NDArray[np.float64]
"""[N, 6]: one chosen expert a row, with the columns above."""


def read_route_csv(path: str | os.PathLike[str]) -> Trace:
    """Import a `route_trace v1` CSV (Helldez/BigMoeOnEdge, Apache-2.0).

    It holds chosen experts and weights, no scores. Prompt tokens become one call per layer. A layer
    whose prompt routing is recorded for fewer tokens than the others (the last one, in these files)
    gets a call of that many tokens.

    Raises:
        TraceError: not such a file, or a value out of range.
    """
    try:
        lines = read_regular(path, MAX_BYTES).decode("utf-8").splitlines()
        facts = _facts(lines)
        return _trace(_rows(lines), facts, Path(path).name)
    except UNSOUND as error:
        reason = f"{type(error).__name__}: {error}"
        raise TraceError(f"{path}: not a sound route_trace v1 file ({reason})") from None


def _facts(lines: Sequence[str]) -> dict[str, str]:
    """What the comment lines say about the model, as `key=value`; the first value counts."""
    if not lines or not lines[0].startswith(FIRST_LINE):
        raise ValueError(f"the first line is not {FIRST_LINE!r}")
    facts: dict[str, str] = {}
    for line in lines:
        if not line.startswith("#"):
            continue
        found = re.findall(r"(\w+)=(\S+)", line[:MAX_FACTS])
        for key, value in found:
            facts.setdefault(key, value)
    file = Path(facts["model"]).name
    facts["model"] = file.removesuffix(".gguf")
    return facts


def _rows(lines: Sequence[str]) -> Rows:
    """The table, without its other columns."""
    values = array("d")  # lists of so many texts would take ten times the file
    table = [line for line in lines if line and not line.startswith("#")]
    for row in csv.DictReader(table):
        for name in COLUMNS:
            values.append(float(row[name]))
    rows = np.array(values).reshape(-1, len(COLUMNS))
    if not np.isfinite(rows).all():
        raise ValueError("a value is no finite number")
    return rows


def _trace(rows: Rows, facts: dict[str, str], name: str) -> Trace:
    experts = int(facts["n_expert"])
    top_k = int(facts["n_expert_used"])
    chosen = rows[:, EXPERT]
    layers = np.unique(rows[:, LAYER])
    if chosen.min() < 0 or chosen.max() >= experts:
        raise ValueError("an expert number is out of range")
    header = TraceHeader(
        model=facts["model"],
        layers=len(layers),
        experts=experts,
        top_k=top_k,
        expert_bytes=int(facts["expert_bytes"]),
        source=f"{name}: Helldez/BigMoeOnEdge 2d4f2b11, Apache-2.0",
    )
    check_header(header)
    calls: list[Call] = []
    for part in _calls(rows):
        # Layers without experts have no rows: positions are among the others.
        layer = int(np.searchsorted(layers, part[0, LAYER]))
        ids = part[:, EXPERT].astype(np.int64)
        weights = part[:, WEIGHT].astype(np.float32)
        ids = ids.reshape(-1, top_k)
        weights = weights.reshape(-1, top_k)
        calls.append(Call(layer, ids, weights, None, ()))
    return Trace(header, calls)


def _calls(rows: Rows) -> Iterator[Rows]:
    """The rows of each layer call: the prompt's as one pass, then those of each answer token."""
    for phase in (PROMPT, ANSWER):
        part = rows[rows[:, PHASE] == phase]
        if not len(part):
            continue
        steps = part[:, STEP]
        layers = part[:, LAYER]
        slots = part[:, SLOT]
        passes = steps
        if phase == PROMPT:
            passes = np.zeros_like(steps)
        # The last key sorts first.
        order = np.lexsort((slots, steps, layers, passes))
        new_pass = np.diff(passes[order]) != 0
        new_layer = np.diff(layers[order]) != 0
        ends = np.flatnonzero(new_pass | new_layer)
        yield from np.split(part[order], ends + 1)
