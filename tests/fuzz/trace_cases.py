"""Damaged and hostile routing traces, read and walked through."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_plugin.replay.sources import load_trace
from tests.fuzz.json_values import changed, hurt

_TRACES = Path(__file__).resolve().parents[2] / "eval" / "data"
_CSV = "# route_trace v1 model=m.gguf n_expert=8 n_expert_used=2 expert_bytes=64\nphase,step,layer,slot,expert,weight\n"


def cases(rng: random.Random, folder: Path, models: dict[str, Path]) -> Iterator[tuple[str, Callable[[], int | None]]]:
    """(what was done, a call that tries it), without end."""
    members = _members((_TRACES / "gptoss.trace").read_bytes())
    while True:
        path = folder / rng.choice(("routes.trace", "routes.trace", "routes.csv"))
        what, raw = _csv(rng) if path.suffix == ".csv" else _archive(rng, members)
        if rng.random() < 0.25:
            what, raw = f"{what}, bytes hurt", hurt(rng, raw)
        path.write_bytes(raw)
        yield what, lambda path=path: _walk(path)


def _walk(path: Path) -> None:
    trace = load_trace(path)
    for group in trace.passes():
        for call in group:
            assert call.ids.shape == call.weights.shape and 0 <= call.layer < trace.header.layers


def _members(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(rng: random.Random, sound: dict[str, bytes]) -> tuple[str, bytes]:
    members = dict(sound)
    name = rng.choice(list(members))
    action = rng.randrange(5)
    if action == 0:
        del members[name]
    elif action == 1 and not name.endswith(".json"):
        name = rng.choice([other for other in members if not other.endswith(".json")])
        members[name] = _array(rng)
    elif action == 2:
        members[name] = hurt(rng, members[name])
    elif action == 3:
        name = rng.choice(("header.json", "footer.json"))
        members[name] = json.dumps(changed(rng, json.loads(members[name]))).encode()
    else:
        members[name] = members[rng.choice(list(members))]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, data in members.items():
            archive.writestr(other, data)
    return f"{name}: action {action}", made.getvalue()


def _array(rng: random.Random) -> bytes:
    """An array of another type or shape, or one whose header promises what does not follow."""
    shape = tuple(rng.choice((0, 1, 2, 8, 100, 1000)) for _ in range(rng.choice((0, 1, 2, 3))))
    kind: Any = rng.choice((np.int16, np.int32, np.float16, np.int64, np.float64, np.bool_, "S4", "c8", "M8[s]"))
    out = io.BytesIO()
    if rng.random() < 0.2:  # unpacks a thousandfold
        np.lib.format.write_array(out, np.zeros((rng.choice((1 << 20, 1 << 24)), 2), np.int16))
        return out.getvalue()
    np.lib.format.write_array(out, np.zeros(shape, kind))
    raw = out.getvalue()
    if rng.random() < 0.4:
        raw = raw.replace(b"'shape': (", b"'shape': (9999999,", 1)
    return raw


def _csv(rng: random.Random) -> tuple[str, bytes]:
    values = ("0", "1", "2", "-1", "7", "8", "1e300", "nan", "inf", "", "x", '"', "99999999999999999999")
    rows = [[rng.choice(values[:3] if rng.random() < 0.97 else values) for _ in range(6)] for _ in range(40)]
    text = _CSV + "\n".join(",".join(row) for row in rows)
    if rng.random() < 0.3:
        text = text.replace(rng.choice(("=8", "=2", "=64", "m.gguf", "phase", "# route")), rng.choice(values), 1)
    return text[:60], text.encode()
