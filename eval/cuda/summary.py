"""The figures of `eval.cuda`'s last line, computed from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from eval.gpu_bench.baselines import SYSTEMS
from eval.policies.systems import KTRANSFORMERS, OURS

VERDICTS = (
    "decode_speedup_geomean",
    "prefill_speedup_geomean",
    "worst_cell_vs_any_baseline",
)
"""Figures that a quick run leaves null."""

Row = dict[str, Any]
Cell = tuple[str, float, str]
"""Model, cache size, phase."""


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Speed-ups and share of the roofline, from the rows' medians."""
    against_static: dict[str, list[float]] = {"decode": [], "prefill": []}
    against_any: list[float] = []
    shares: list[float] = []
    for (_, _, phase), methods in _by_cell(rows).items():
        ours = methods[OURS.name]
        ours_ms = ours["p50_ms"]
        for system in SYSTEMS:
            if system is OURS:
                continue
            gain = methods[system.name]["p50_ms"] / ours_ms
            against_any.append(gain)
            if system is KTRANSFORMERS:
                against_static[phase].append(gain)
        if phase == "decode":
            shares.append(ours["roofline_ms"] / ours_ms)
    return {
        "decode_speedup_geomean": geometric_mean(against_static["decode"]),
        "prefill_speedup_geomean": geometric_mean(against_static["prefill"]),
        "worst_cell_vs_any_baseline": min(against_any),
        "roofline_share": geometric_mean(shares),
    }


def _by_cell(rows: Sequence[Row]) -> dict[Cell, dict[str, Row]]:
    """Cell -> method -> row."""
    found: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        cell = row["model"], row["cache"], row["phase"]
        found.setdefault(cell, {})[row["method"]] = row
    return found
