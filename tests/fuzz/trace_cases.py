"""Damaged and hostile routing traces, read and walked through."""

from __future__ import annotations

import functools
import io
import json
import math
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eval.policies import systems
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.replay.simulator import replay
from hybrimoe_plugin.replay.sources import load_trace, synthetic, with_predictions
from hybrimoe_plugin.replay.trace import write_trace
from tests.fuzz.json_values import changed, hurt

_TRACES = Path(__file__).resolve().parents[2] / "eval" / "data"
_CSV = (
    "# route_trace v1 model=m.gguf n_expert=8 n_expert_used=2 "
    "expert_bytes=64\nphase,step,layer,slot,expert,weight\n"
)
_CELLS = (
    "0",
    "1",
    "2",
    "-1",
    "7",
    "8",
    "0.5",
    "1e300",
    "nan",
    "inf",
    "",
    "x",
    '"',
    "99999999999999999999",
)


def cases(
    rng: random.Random, folder: Path, models: dict[str, Path]
) -> Iterator[tuple[str, Callable[[], int | None]]]:
    """(what was done, a call that tries it), without end."""
    archives = [_members((_TRACES / "gptoss.trace").read_bytes()), *[_members(_small(folder))] * 3]
    while True:
        path = folder / rng.choice(("routes.trace", "routes.trace", "routes.csv"))
        what, raw = _csv(rng) if path.suffix == ".csv" else _archive(rng, rng.choice(archives))
        if rng.random() < 0.1:
            what, raw = f"{what}, bytes hurt", hurt(rng, raw)
        path.write_bytes(raw)
        yield what, lambda path=path: _replay(path)


def _small(folder: Path) -> bytes:
    """A trace that has everything a trace may have: prompts, scores and predictions."""
    path = folder / "sound.trace"
    drawn = synthetic(
        4, 8, 2, model="small", expert_bytes=1 << 20, prompt_tokens=6, decode_tokens=8
    )
    made = with_predictions(drawn, 0.8)
    write_trace(path, made.header, made.calls, score_top=8)
    return path.read_bytes()


def _replay(path: Path) -> None:
    """What `python -m eval.replay` does with a trace."""
    trace = load_trace(path)
    for group in trace.passes():
        for call in group:
            assert call.ids.shape == call.weights.shape and 0 <= call.layer < trace.header.layers
    if len(trace.calls) < 200:
        replay(trace, systems.build(systems.OURS, trace, _costs(), 0.5, None))


def _members(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(rng: random.Random, sound: dict[str, bytes]) -> tuple[str, bytes]:
    members = dict(sound)
    name = rng.choice(list(members))
    action = rng.choice(
        ("missing", "other", "hurt", "json", "swapped", "values", "values", "values", "values")
    )
    arrays = [other for other in members if not other.endswith(".json")]
    if action == "missing":
        del members[name]
    elif action == "other":
        name = rng.choice(arrays)
        members[name] = _array(rng)
    elif action == "hurt":
        members[name] = hurt(rng, members[name])
    elif action == "json":
        name = rng.choice(("header.json", "header.json", "footer.json"))
        members[name] = json.dumps(changed(rng, json.loads(members[name]))).encode()
    elif action == "swapped":
        members[name] = members[rng.choice(list(members))]
    else:
        for name in rng.sample(arrays, rng.choice((1, 1, 3))):
            members[name] = _other_values(rng, members[name])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, data in members.items():
            archive.writestr(other, data)
    return f"{name}: {action}", made.getvalue()


def _other_values(rng: random.Random, raw: bytes) -> bytes:
    """The same array with a few other values, mostly ones that it holds elsewhere."""
    values = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False).copy()
    flat = values.reshape(-1)
    for _ in range(rng.choice((1, 1, 5)) if flat.size else 0):
        near = (flat[rng.randrange(flat.size)], flat[rng.randrange(flat.size)] // 2 + 1, 0, 1)
        far = (-1, 7, 32767, math.nan if values.dtype.kind == "f" else -32768)
        flat[rng.randrange(flat.size)] = rng.choice(near if rng.random() < 0.8 else far)
    out = io.BytesIO()
    np.lib.format.write_array(out, values)
    return out.getvalue()


def _array(rng: random.Random) -> bytes:
    """An array of another type or shape, or one whose header promises what does not follow."""
    shape = tuple(rng.choice((0, 1, 2, 8, 100, 1000)) for _ in range(rng.choice((0, 1, 2, 3))))
    kind: Any = rng.choice(
        (np.int16, np.int32, np.float16, np.int64, np.float64, np.bool_, "S4", "c8", "M8[s]")
    )
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
    """A prompt of three tokens and five single ones through three layers; then up to two cells are
    changed.
    """
    rows = []
    for phase, step in [(0, 0), (0, 1), (0, 2), *((1, step) for step in range(5))]:
        for layer in range(3):
            experts = rng.sample(range(8), 2)
            rows += [[phase, step, layer, slot, expert, 0.5] for slot, expert in enumerate(experts)]
    cells = [[str(value) for value in row] for row in rows]
    for _ in range(rng.choice((0, 1, 1, 2))):
        rng.choice(cells)[rng.randrange(6)] = rng.choice(_CELLS)
    if rng.random() < 0.2:
        del cells[rng.randrange(len(cells))]
    text = _CSV + "\n".join(",".join(row) for row in cells)
    if rng.random() < 0.3:
        text = text.replace(
            rng.choice(("=8", "=2", "=64", "m.gguf", "phase", "# route")), rng.choice(_CELLS), 1
        )
    return text[:60], text.encode()


@functools.cache
def _costs() -> CostModel:
    return CostModel(
        CostCurve((1, 2, 64), (800, 900, 9000)), 200, CostCurve((1, 64), (60, 90)), 20, 250
    )
