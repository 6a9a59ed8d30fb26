"""A model's layers and where each part will lie, with bars for the memory of each place."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import groupby

from hybrimoe_plugin.cli.picture.svg import COLOURS, WIDTH, page, rectangle, text
from hybrimoe_plugin.device.memory import human
from hybrimoe_plugin.hosts.transformers.preparation.prediction import (
    EMULATED,
    PLACES,
    LayerPlace,
    Part,
    Prediction,
)

_EDGE = 16
_LEFT = 150
"""Where the layers' rows begin, right of their names."""
_DENSE = 150
"""Width of the column for attention and other dense parts."""
_GAP = 12
_EXPERTS = _LEFT + _DENSE + _GAP
_ROW = 9
_LAYER = 11
"""Height of a layer's row, and of the row with the gap below it."""
_APART = 18
"""Space between layers that are treated differently: their names need it."""
_BAR = 16
"""Height of a memory bar."""
_LONGEST = 108
"""Characters of small text that a line has room for."""


def picture(prediction: Prediction, title: str) -> str:
    """The text of an SVG file, `WIDTH` pixels wide.

    Args:
        title: of the model and its rules.
    """
    shapes = [text(_EDGE, 28, title, "title")]
    y = _legend(prediction, 52, shapes)
    y = _layers(prediction, y + 30, shapes)
    y = _memory(prediction, y + 26, shapes)
    return page(y + 8, f"{title}: where each part will lie", shapes)


def _legend(prediction: Prediction, y: float, shapes: list[str]) -> float:
    x = float(_EDGE)
    for place in prediction.places():
        name = PLACES.get(place, place)
        # About seven pixels a character at this size.
        width = 18 + 7.2 * len(name) + 14
        if x + width > WIDTH - _EDGE:
            x = _EDGE
            y += 20
        shapes.append(rectangle(x, y - 10, 12, 12, _colour(place)))
        shapes.append(text(x + 18, y, name))
        x += width
    return y


def _layers(prediction: Prediction, y: float, shapes: list[str]) -> float:
    shapes.append(text(_LEFT, y, "attention, dense", "head"))
    accelerated = any(layer.cached for layer in prediction.layers)
    experts = "routed experts"
    if accelerated:
        experts += " (left: cached on the accelerator at the start)"
    shapes.append(text(_EXPERTS, y, experts, "head"))
    y += 10
    if prediction.outside:
        shapes.append(text(_EDGE, y + _ROW, "outside layers"))
        _dense(prediction.outside, y, shapes)
        y += _LAYER + _APART
    accelerator = _accelerator(prediction)
    for index, (_, group) in enumerate(groupby(prediction.layers, key=_alike)):
        members = list(group)
        if index:
            y += _APART
        shapes.append(text(_EDGE, y + _ROW, _name(members)))
        note = _note(members[0])
        if note:
            shapes.append(text(_EDGE, y + _ROW + 15, note, "small warn"))
        top = y
        for layer in members:
            _row(layer, y, accelerator, shapes)
            y += _LAYER
        # A single layer is lower than its name and note.
        y = max(y, top + (24 if note else 12))
    return y


def _row(layer: LayerPlace, y: float, accelerator: str, shapes: list[str]) -> None:
    _dense(layer.dense, y, shapes)
    width = WIDTH - _EDGE - _EXPERTS
    if layer.experts is None:
        shapes.append(rectangle(_EXPERTS, y, width, _ROW, "empty"))
        return
    cached = width * layer.cached / layer.routed if layer.routed else 0.0
    if cached:
        shapes.append(rectangle(_EXPERTS, y, cached, _ROW, _colour(accelerator)))
    if cached < width:
        kind = _colour(layer.experts)
        shapes.append(rectangle(_EXPERTS + cached, y, width - cached, _ROW, kind))


def _dense(held: Mapping[str, int], y: float, shapes: list[str]) -> None:
    """Dense parts, each place with its share of the width."""
    total = sum(held.values())
    x = float(_LEFT)
    for place, nbytes in held.items():
        width = _DENSE * nbytes / total if total else 0.0
        shapes.append(rectangle(x, y, width, _ROW, _colour(place)))
        x += width


def _memory(prediction: Prediction, y: float, shapes: list[str]) -> float:
    head = f"predicted memory, with a context of {prediction.context} tokens"
    shapes.append(text(_EDGE, y, head, "head"))
    y += 12
    places = prediction.places()
    most = max((prediction.total(place) for place in places), default=0)
    for place in places:
        total = prediction.total(place)
        shapes.append(text(_EDGE, y + 13, PLACES.get(place, place)))
        shapes.append(text(WIDTH - _EDGE, y + 13, human(total), "end"))
        width = (WIDTH - 2 * _EDGE) * (total / most if most else 0.0)
        shapes.append(rectangle(_EDGE, y + 18, max(width, 1.0), _BAR, _colour(place)))
        held = [part for part in prediction.parts if part.place == place and part.nbytes]
        y += 18 + _BAR
        for line in _listed(held):
            y += 15
            shapes.append(text(_EDGE, y, line, "small"))
        y += 12
    return y


def _listed(parts: list[Part]) -> list[str]:
    """The parts of a place, the largest first, as lines of text."""
    items = []
    for part in sorted(parts, key=lambda part: -part.nbytes):
        limit = "up to " if part.most else ""
        items.append(f"{part.what}: {limit}{human(part.nbytes)}")
    return textwrap.wrap("; ".join(items), _LONGEST)


def _alike(layer: LayerPlace) -> tuple[object, ...]:
    return tuple(layer.dense), layer.experts, layer.routed, layer.replaced


def _name(members: list[LayerPlace]) -> str:
    first, last = members[0].layer, members[-1].layer
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _note(layer: LayerPlace) -> str:
    if layer.experts is None:
        return "no routed experts"
    return "" if layer.replaced else "no rule for experts"


def _accelerator(prediction: Prediction) -> str:
    """The place whose colour cached experts have."""
    found = [place for place in prediction.places() if place not in PLACES]
    return found[0] if found else EMULATED


def _colour(place: str) -> str:
    return place if place in COLOURS else "accelerator"
