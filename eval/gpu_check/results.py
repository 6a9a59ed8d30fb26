"""What the stages found, read back from the results file, and the verdict on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

END = "end"
"""The `case` of the line that says how a stage's process ended."""
OURS = "ours"
STATIC = "kTransformers-like static"
LOAD_EVERY_MISS = "load every miss, LRU"
PUBLISHED = "HybriMoE as published"


def merged(lines: Iterable[Line]) -> list[Line]:
    """The lines that count: of each stage, its newest whole run and what later runs measured again.

    A run that was cut off replaces the cases that it measured and leaves the others, so that two
    such runs make a whole one. A run that ended well replaces everything that the stage said
    before. Lines must be of one device.
    """
    stages: dict[str, dict[str, Line]] = {}
    for line in lines:
        if "stage" in line and "case" in line:
            stage = line["stage"]
            stages[stage] = _with(stages.get(stage, {}), line)
    found: list[Line] = []
    for cases in stages.values():
        found += cases.values()
    return found


def _with(cases: dict[str, Line], line: Line) -> dict[str, Line]:
    """A stage's lines by case, after one more of them. Mutates: `cases`."""
    status = line.get("status")
    if line["case"] != END:
        cases[line["case"]] = line
        return cases
    if status == "ok":
        run = line.get("run")
        whole = {case: kept for case, kept in cases.items() if kept.get("run") == run}
        return {**whole, END: line}
    # A later run that had no time for the stage does not undo its failure.
    if status != "skipped" or END not in cases:
        cases[END] = line
    return cases


def done(lines: Sequence[Line]) -> set[str]:
    """The stages whose newest process ended well, with nothing wrong."""
    ended = {stage for stage, status in _ends(lines).items() if status == "ok"}
    wrong = {line["stage"] for line in _wrong(lines)}
    return ended - wrong


def rows(lines: Sequence[Line], stage: str) -> list[Line]:
    """The stage's results without the line that says how it ended."""
    return [line for line in lines if line["stage"] == stage and line["case"] != END]


def summary(
    lines: Sequence[Line],
    wanted: Iterable[str],
    judges: Iterable[str],
) -> dict[str, Any]:
    """The verdict: one flat object. What was not measured is None, never a guess.

    Args:
        wanted: the stages that this kind of check consists of.
        judges: those of them without which nothing is known to be right.
    """
    ends = _ends(lines)
    missing = {stage for stage in wanted if ends.get(stage, "skipped") == "skipped"}
    failed = {stage for stage in ends if ends[stage] not in ("ok", "skipped")}
    ours = _times(lines, OURS)
    static = _times(lines, STATIC)
    load_every_miss = _times(lines, LOAD_EVERY_MISS)
    published = _times(lines, PUBLISHED)
    hits = _all_hits(lines)
    decode_ms = ours.get("decode_ms_p50")
    return {
        "correct": _correct(lines, judges),
        "kernel_share": min(_figures(lines, "kernel_share"), default=None),
        "int8_share": min(_figures(lines, "int8_share"), default=None),
        "link_share": min(_figures(lines, "link_share"), default=None),
        "host_us_per_layer": next(iter(_figures(lines, "host_us_per_layer")), None),
        "decode_tok_s": 1e3 / decode_ms if decode_ms is not None else None,
        "decode_vs_static": _ratio(static, ours, "decode_ms_p50"),
        "decode_vs_load_every_miss": _ratio(load_every_miss, ours, "decode_ms_p50"),
        "decode_vs_published": _ratio(published, ours, "decode_ms_p50"),
        "prefill_vs_static": _ratio(static, ours, "prefill_ms_p50"),
        "layer_us": hits.get("us_per_layer"),
        "layer_roofline_share": hits.get("roofline_share"),
        "waits_per_hit_token": hits.get("waits_per_token"),
        "onload_us": max(_figures(lines, "onload_us_p50"), default=None),
        "emulated": any(line.get("emulated") for line in lines),
        "stages_failed": sorted(failed),
        "stages_missing": sorted(missing),
        "wrong": [f"{line['stage']}: {line['case']}" for line in _wrong(lines)],
    }


def headline(lines: Sequence[Line], stage: str) -> str:
    """One cell of the table: number of rows, how many of the judged ones are right, worst error."""
    mine = rows(lines, stage)
    if not mine:
        return "no rows"
    parts = [f"{len(mine)} rows"]
    judged = _judged(mine)
    if judged:
        right = sum(bool(line["ok"]) for line in judged)
        parts.append(f"{right} of {len(judged)} right")
    errors = _figures(judged, "error")
    if errors:
        parts.append(f"largest error {max(errors):.1e}")
    missing = [line["missing"] for line in mine if line.get("missing")]
    if missing:
        parts.append(f"missing: {missing[0]}")
    return ", ".join(parts)


def _ends(lines: Sequence[Line]) -> dict[str, str]:
    """Stage -> how its newest process ended."""
    return {line["stage"]: line["status"] for line in lines if line["case"] == END}


def _judged(lines: Sequence[Line]) -> list[Line]:
    """Lines that say whether something is right."""
    found = []
    for line in lines:
        is_end = line["case"] == END
        if not is_end and line.get("ok") is not None:
            found.append(line)
    return found


def _wrong(lines: Sequence[Line]) -> list[Line]:
    return [line for line in _judged(lines) if not line["ok"]]


def _correct(lines: Sequence[Line], judges: Iterable[str]) -> bool | None:
    """Whether everything judged is right; None unless every judging stage ended well.

    One wrong case is enough for False.
    """
    if _wrong(lines):
        return False
    judged = {line["stage"] for line in _judged(lines)}
    sound = done(lines) & judged
    if judged and set(judges) <= sound:
        return True
    return None


def _times(lines: Sequence[Line], system: str) -> Line:
    """The core model's times of one system; empty if it was not measured."""
    found = [line for line in rows(lines, "model") if line.get("system") == system]
    return found[-1] if found else {}


def _all_hits(lines: Sequence[Line]) -> Line:
    """The first row of the stage `path`: ours as it is, all experts cached; empty without one."""
    found = [line for line in rows(lines, "path") if line.get("cache") == 1.0]
    return found[0] if found else {}


def _ratio(theirs: Line, ours: Line, name: str) -> float | None:
    """Their time over ours.

    Returns:
        None where they were not measured in one run, one after the other.
    """
    if not theirs or not ours:
        return None
    if theirs.get("run") != ours.get("run"):
        return None
    return float(theirs[name] / ours[name])


def _figures(lines: Sequence[Line], name: str) -> list[float]:
    """All values of a figure; words in place of a number are left out."""
    found = []
    for line in lines:
        value = line.get(name)
        if isinstance(value, float):
            found.append(value)
    return found
