"""Samples as server-sent events. Each says everything, so one that was missed is no loss.

    event: model     layers, experts, what the lanes are of      once, at the beginning
    event: sample    places, uses, lanes, rates                  several times a second

Maps and lanes are bytes in base64, rows after one another. Places are two bits for each expert,
uses one bit, the first expert in the lowest bits; lanes are one byte for each piece of time, 255
for a part that is busy throughout.
"""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.serve.live.lanes import NAMES
from hybrimoe_plugin.serve.live.places import Place
from hybrimoe_plugin.serve.live.sources import Sample, Source
from hybrimoe_plugin.serve.requests import Load


def model_event(name: str, source: Source | None) -> bytes:
    """What is watched; without layers where the model has no experts of ours."""
    body: dict[str, Any] = {"model": name, "layers": []}
    if source is not None:
        body = {
            "model": name,
            "layers": list(source.layers),
            "experts": source.experts,
            "accelerator": source.accelerator,
            "flash": source.flash,
            "window_ms": source.window_us / 1e3,
        }
    return _event("model", body)


def sample_event(sample: Sample, load: Load) -> bytes:
    """One sample, and what the scheduler has to do."""
    rates = sample.rates
    counts = np.bincount(sample.places.ravel(), minlength=len(Place)).tolist()
    body: dict[str, Any] = {
        "places": _packed(sample.places, bits=2),
        "used": _packed(sample.used.astype(np.uint8), bits=1),
        "counts": {place.name.lower(): counts[place] for place in Place},
        "tokens_s": round(rates.tokens_s, 2),
        "prompt_s": round(rates.prompt_s, 1),
        "hit_rate": None if rates.hit_rate is None else round(rates.hit_rate, 4),
        "running": load.running,
        "waiting": load.waiting,
    }
    if sample.lanes is not None:
        heights = np.rint(sample.lanes * 255).astype(np.uint8)
        body["lanes"] = {name: _base64(lane) for name, lane in zip(NAMES, heights, strict=True)}
    return _event("sample", body)


def _event(name: str, body: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def _packed(values: NDArray[np.uint8], bits: int) -> str:
    """Small numbers side by side in bytes, the first one in the lowest bits."""
    digits = np.unpackbits(values.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return _base64(np.packbits(digits, bitorder="little"))


def _base64(values: NDArray[np.uint8]) -> str:
    return b64encode(values.tobytes()).decode()
