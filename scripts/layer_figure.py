"""Draw docs/figures/layer.svg: one layer of one token under three ways of placing its experts.

`python scripts/layer_figure.py`. The plans come from the real schedulers and the times from their
machine model, with the round costs below; docs/how-it-works.md works through the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.policy.schedule import Slice, make_scheduler, simulate

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "layer.svg"

CPU_US = 300.0
CPU_FIRST_US = 100.0
ACCELERATOR_US = 100.0
TRANSFER_US = 400.0
ATTENTION_US = 500.0
"""Between this layer's experts and the next layer's."""

CACHED = (3, 17)
OFFLOADED_EXPERTS = (8, 25, 40, 61)
"""The router's choice for one token: 6 of 64 experts, of which 2 are in the cache."""

PANELS = (
    ("accelerator_only", "Load every miss"),
    ("static", "Compute every miss on the CPU"),
    ("hybrimoe", "Plan: split the misses by cost"),
)

LANES = ("link", "accelerator", "cpu")
"""From top to bottom."""

LANE_NAMES = {"link": "PCIe link", "accelerator": "GPU", "cpu": "CPU"}
COLOURS = {"link": "#e8a33d", "accelerator": "#4f9d69", "cpu": "#4a7fb5"}

TITLE = "One layer, one token: the router chose 6 experts; 3 and 17 are cached on the GPU"
WIDTH = 900
LEFT = 100
PIXELS_PER_US = 0.44
BAR = 22
LANE = 28
PANEL = 140
TOP = 44

PAGE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"
 width="{width}" height="{height}" font-family="sans-serif">
<rect width="{width}" height="{height}" fill="white"/>"""

RECTANGLE = (
    '<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    ' fill="{fill}" stroke="{border}" stroke-dasharray="4 3"/>'
)

TEXT = (
    '<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}"'
    ' text-anchor="{anchor}" fill="{colour}">{text}</text>'
)

FINISH = '<path d="M{x:g} {top}V{bottom}" stroke="#c0392b" stroke-width="2"/>'


class Plan(NamedTuple):
    """One panel: a scheduler's plan for the layer, played out."""

    scheduler: str
    title: str
    makespan_us: float
    slices: tuple[Slice, ...]


def plans() -> list[Plan]:
    """The three plans of the figure, from the engine's own schedulers."""
    costs = _costs()
    routed = _routed(CACHED, OFFLOADED_EXPERTS)
    found = []
    for name, title in PANELS:
        scheduler = make_scheduler(name, costs, has_accelerator=True)
        chosen = scheduler.plan(routed)
        run = simulate(chosen, routed, costs)
        plan = Plan(name, title, run.makespan_us, run.slices)
        found.append(plan)
    return found


def with_one_prefetched() -> float:
    """The planned time of the same layer if one of its misses had been prefetched."""
    arrived, *missing = OFFLOADED_EXPERTS
    routed = _routed((*CACHED, arrived), missing)
    scheduler = make_scheduler("hybrimoe", _costs(), has_accelerator=True)
    return scheduler.plan(routed).makespan_us


def _costs() -> CostModel:
    return CostModel(
        cpu=CostCurve([1], [CPU_US]),
        cpu_first_us=CPU_FIRST_US,
        accelerator=CostCurve([1], [ACCELERATOR_US]),
        accelerator_first_us=0.0,
        transfer_us=TRANSFER_US,
        between_layers_us=ATTENTION_US,
    )


def _routed(cached: Iterable[int], missing: Iterable[int]) -> list[Routed]:
    """Experts with one token each."""
    resident = [Routed(expert, 1, 0.0) for expert in cached]
    offloaded = [Routed(expert, 1, OFFLOADED) for expert in missing]
    return resident + offloaded


def svg() -> str:
    """The figure's text."""
    bottom = TOP + PANEL * len(PANELS)
    height = bottom + 34
    parts = [
        PAGE.format(width=WIDTH, height=height),
        _text(14, 26, TITLE, size=15),
    ]
    top = TOP
    for plan in plans():
        parts += _panel(plan, top)
        top += PANEL
    parts += _axis(bottom)
    parts.append("</svg>\n")
    return "\n".join(parts)


def _panel(plan: Plan, top: int) -> list[str]:
    title = f"{plan.title}: {plan.makespan_us:,.0f} µs"
    parts = [_text(14, top + 18, title, weight="bold")]
    for lane in LANES:
        parts += _lane(lane, plan.slices, top)
    if plan.scheduler == "hybrimoe":
        parts += _next_layer(plan, top)
    finish = FINISH.format(
        x=_x(plan.makespan_us),
        top=_lane_top("link", top) - 4,
        bottom=_lane_top("cpu", top) + BAR + 4,
    )
    parts.append(finish)
    return parts


def _lane(lane: str, slices: Sequence[Slice], top: int) -> list[str]:
    y = _lane_top(lane, top)
    parts = [
        _text(14, y + 16, LANE_NAMES[lane]),
        _rectangle(LEFT, y, WIDTH - LEFT - 14, "#f3f3f3"),
    ]
    for item in slices:
        if item.lane == lane:
            parts += _bar(item, y)
    return parts


def _bar(item: Slice, y: int) -> list[str]:
    x = _x(item.start_us)
    width = _x(item.end_us) - x
    name = str(item.expert)
    middle = x + width / 2
    return [
        _rectangle(x, y, width - 1, COLOURS[item.lane]),
        _text(middle, y + 16, name, anchor="middle", colour="white"),
    ]


def _next_layer(plan: Plan, top: int) -> list[str]:
    """What the link and the GPU do once this layer's own work is handed out."""
    free_us = 0.0
    for item in plan.slices:
        if item.lane == "link":
            free_us = max(free_us, item.end_us)
    prefetch = _dashed("link", "prefetch", free_us, TRANSFER_US, top)
    done_us = plan.makespan_us
    attention = _dashed("accelerator", "next layer's attention", done_us, ATTENTION_US, top)
    return prefetch + attention


def _dashed(lane: str, label: str, start_us: float, time_us: float, top: int) -> list[str]:
    x = _x(start_us) + 1
    y = _lane_top(lane, top)
    width = time_us * PIXELS_PER_US - 3
    middle = x + width / 2
    return [
        _rectangle(x, y, width, "white", border=COLOURS[lane]),
        _text(middle, y + 16, label, anchor="middle"),
    ]


def _axis(y: int) -> list[str]:
    parts = [_text(14, y + 20, "time")]
    for us in range(0, 1601, 400):
        tick = _text(_x(us), y + 20, f"{us:,} µs", anchor="middle")
        parts.append(tick)
    return parts


def _lane_top(lane: str, top: int) -> int:
    return top + 28 + LANE * LANES.index(lane)


def _x(us: float) -> float:
    return LEFT + us * PIXELS_PER_US


def _rectangle(x: float, y: float, width: float, fill: str, border: str = "none") -> str:
    return RECTANGLE.format(
        x=x,
        y=y,
        width=width,
        height=BAR,
        fill=fill,
        border=border,
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    weight: str = "normal",
    anchor: str = "start",
    colour: str = "#222",
) -> str:
    return TEXT.format(
        x=x,
        y=y,
        text=text,
        size=size,
        weight=weight,
        anchor=anchor,
        colour=colour,
    )


def main() -> int:
    FIGURE.write_text(svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
