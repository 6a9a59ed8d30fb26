"""What the stages found, read back from the results file: the newest line of every case, and the verdict over them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

END = "end"
"""The `case` of the line that says how a stage's process ended."""
RATIO_SYSTEMS = {"decode_vs_static": "kTransformers-like static", "decode_vs_load_every_miss": "load every miss, LRU"}
OURS = "ours"


def merged(lines: Iterable[Line]) -> list[Line]:
    """The newest line of each case, in the order in which cases were first seen.

    A stage that was run again replaces what it measured again and leaves the rest, so that two runs that were cut off
    make a whole one. Lines of another device than the newest line's are left out: numbers of two cards never mix.
    """
    found = [line for line in lines if "stage" in line and "case" in line]
    devices = [_device(line) for line in found if line.get("gpu") is not None]
    cases: dict[tuple[str, str], Line] = {}
    for line in found:
        # A stage that died before it could name its device counts with whatever device there is.
        if line.get("gpu") is None or _device(line) == devices[-1]:
            cases[line["stage"], line["case"]] = line
    return list(cases.values())


def done(lines: Sequence[Line]) -> set[str]:
    """The stages whose newest process ended well."""
    return {line["stage"] for line in lines if line["case"] == END and line.get("status") == "ok"}


def rows(lines: Sequence[Line], stage: str) -> list[Line]:
    """The stage's results without the line that says how it ended."""
    return [line for line in lines if line["stage"] == stage and line["case"] != END]


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """The verdict: one flat object. What was not measured is None, never a guess."""
    judged = [line for line in lines if line.get("ok") is not None and line["case"] != END]
    ends = [line for line in lines if line["case"] == END]
    ours = _times(lines, OURS)
    found: dict[str, Any] = {
        "correct": all(line["ok"] for line in judged) if judged else None,
        "kernel_share": _least(lines, "kernel_share"),
        "link_share": _least(lines, "link_share"),
        "host_us_per_layer": _one(lines, "host_us_per_layer"),
        "decode_tok_s": 1e3 / ours["decode_ms_p50"] if "decode_ms_p50" in ours else None,
    }
    for name, system in RATIO_SYSTEMS.items():
        found[name] = _ratio(_times(lines, system), ours, "decode_ms_p50")
    found["prefill_vs_static"] = _ratio(_times(lines, RATIO_SYSTEMS["decode_vs_static"]), ours, "prefill_ms_p50")
    emulated = {line.get("emulated") for line in lines}
    found["emulated"] = True in emulated
    found["stages_failed"] = sorted(line["stage"] for line in ends if line.get("status") not in ("ok", "skipped"))
    found["wrong"] = [f"{line['stage']}: {line['case']}" for line in judged if not line["ok"]]
    return found


def headline(lines: Sequence[Line], stage: str) -> str:
    """One cell of the table: how many rows, how many of the judged ones are right, the worst error."""
    mine = rows(lines, stage)
    if not mine:
        return "no rows"
    judged = [line for line in mine if line.get("ok") is not None]
    parts = [f"{len(mine)} rows"]
    if judged:
        parts.append(f"{sum(bool(line['ok']) for line in judged)} of {len(judged)} right")
    errors = [line["error"] for line in judged if isinstance(line.get("error"), float)]
    if errors:
        parts.append(f"largest error {max(errors):.1e}")
    missing = [line["missing"] for line in mine if line.get("missing")]
    if missing:
        parts.append(f"missing: {missing[0]}")
    return ", ".join(parts)


def _device(line: Line) -> tuple[Any, Any]:
    return line.get("gpu"), line.get("emulated")


def _times(lines: Sequence[Line], system: str) -> Line:
    """The core model's times of one system."""
    found = [line for line in rows(lines, "model") if line.get("system") == system]
    return found[-1] if found else {}


def _ratio(theirs: Line, ours: Line, name: str) -> float | None:
    return theirs[name] / ours[name] if name in theirs and name in ours else None


def _least(lines: Sequence[Line], name: str) -> float | None:
    values = [line[name] for line in lines if isinstance(line.get(name), float)]
    return min(values) if values else None


def _one(lines: Sequence[Line], name: str) -> float | None:
    values = [line[name] for line in lines if isinstance(line.get(name), float)]
    return statistics.median(values) if values else None
