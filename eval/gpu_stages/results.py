"""What the stages found, read back from the results file: the newest line of every case, and the
verdict over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

END = "end"
"""The `case` of the line that says how a stage's process ended."""
RATIO_SYSTEMS = {
    "decode_vs_static": "kTransformers-like static",
    "decode_vs_load_every_miss": "load every miss, LRU",
}
OURS = "ours"


def merged(lines: Iterable[Line]) -> list[Line]:
    """What counts of a file's lines: for each stage, its newest whole run and what later runs
    measured again.

    A run that was cut off replaces the cases that it measured and leaves the others, so that two
    such runs make a whole one. A run that ended well replaces everything that the stage said
    before. Lines must be of one device.
    """
    stages: dict[str, dict[str, Line]] = {}
    for line in lines:
        if "stage" not in line or "case" not in line:
            continue
        cases = stages.setdefault(line["stage"], {})
        if line["case"] != END:
            cases[line["case"]] = line
        elif line.get("status") == "ok":
            whole = {
                case: kept for case, kept in cases.items() if kept.get("run") == line.get("run")
            }
            stages[line["stage"]] = {**whole, END: line}
        elif (
            line.get("status") != "skipped" or END not in cases
        ):  # a failure is not undone by having no time
            cases[END] = line
    return [line for cases in stages.values() for line in cases.values()]


def done(lines: Sequence[Line]) -> set[str]:
    """The stages whose newest process ended well, with nothing wrong."""
    ended = {line["stage"] for line in lines if line["case"] == END and line.get("status") == "ok"}
    return ended - {line["stage"] for line in _judged(lines) if not line["ok"]}


def rows(lines: Sequence[Line], stage: str) -> list[Line]:
    """The stage's results without the line that says how it ended."""
    return [line for line in lines if line["stage"] == stage and line["case"] != END]


def summary(lines: Sequence[Line], wanted: Iterable[str], judges: Iterable[str]) -> dict[str, Any]:
    """The verdict: one flat object. What was not measured is None, never a guess.

    Args:
        wanted: the stages that this kind of check consists of.
        judges: those of them without which nothing is known to be right.
    """
    ends = {line["stage"]: line["status"] for line in lines if line["case"] == END}
    ours = _times(lines, OURS)
    found: dict[str, Any] = {
        "correct": _correct(lines, judges),
        "kernel_share": _least(lines, "kernel_share"),
        "link_share": _least(lines, "link_share"),
        "host_us_per_layer": _one(lines, "host_us_per_layer"),
        "decode_tok_s": 1e3 / ours["decode_ms_p50"] if "decode_ms_p50" in ours else None,
    }
    for name, system in RATIO_SYSTEMS.items():
        found[name] = _ratio(_times(lines, system), ours, "decode_ms_p50")
    found["prefill_vs_static"] = _ratio(
        _times(lines, RATIO_SYSTEMS["decode_vs_static"]), ours, "prefill_ms_p50"
    )
    emulated = {line.get("emulated") for line in lines}
    found["emulated"] = True in emulated
    found["stages_failed"] = sorted(
        stage for stage, status in ends.items() if status not in ("ok", "skipped")
    )
    found["stages_missing"] = sorted(
        stage for stage in wanted if ends.get(stage, "skipped") == "skipped"
    )
    found["wrong"] = [
        f"{line['stage']}: {line['case']}" for line in _judged(lines) if not line["ok"]
    ]
    return found


def headline(lines: Sequence[Line], stage: str) -> str:
    """One cell of the table: how many rows, how many of the judged ones are right, the
    worst error.
    """
    mine = rows(lines, stage)
    if not mine:
        return "no rows"
    judged = _judged(mine)
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


def _judged(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.get("ok") is not None and line["case"] != END]


def _correct(lines: Sequence[Line], judges: Iterable[str]) -> bool | None:
    """False as soon as one case is wrong; True only if every judging stage ended well and has
    judged something.
    """
    judged = _judged(lines)
    if not all(line["ok"] for line in judged):
        return False
    sound = done(lines) & {line["stage"] for line in judged}
    return True if judged and set(judges) <= sound else None


def _times(lines: Sequence[Line], system: str) -> Line:
    """The core model's times of one system."""
    found = [line for line in rows(lines, "model") if line.get("system") == system]
    return found[-1] if found else {}


def _ratio(theirs: Line, ours: Line, name: str) -> float | None:
    """Their time over ours; None where they were not measured in one run, one after the other."""
    if not theirs or not ours or theirs.get("run") != ours.get("run"):
        return None
    return float(theirs[name] / ours[name])


def _least(lines: Sequence[Line], name: str) -> float | None:
    return min((line[name] for line in lines if isinstance(line.get(name), float)), default=None)


def _one(lines: Sequence[Line], name: str) -> float | None:
    return next((line[name] for line in lines if isinstance(line.get(name), float)), None)
