"""Files from outside that are no files, or far too large: refused at once by every reader."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limits import in_time

from hybrimoe_plugin.errors import (
    FlashError,
    HybriMoEError,
    ProfileError,
    RulesError,
    TraceError,
    WeightsError,
)
from hybrimoe_plugin.injection.rules import load_rules
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.replay.sources import load_trace, read_popularity
from hybrimoe_plugin.replay.trace import FORMAT, VERSION, read_trace
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from lever_ext.flash.pack import FlashPack

READERS: dict[str, tuple[Callable[[Path], Any], type[HybriMoEError]]] = {
    "weights": (GGUFStore.open, WeightsError),
    "rules": (load_rules, RulesError),
    "profile": (load_profile, ProfileError),
    "trace": (load_trace, TraceError),
    "popularity": (read_popularity, TraceError),
    "pack": (FlashPack.open, FlashError),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_refused_without_waiting(reader: str, tmp_path: Path) -> None:
    read, error = READERS[reader]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with in_time(5), pytest.raises(error, match="pipe"):
        read(pipe)


@pytest.mark.parametrize("reader", READERS)
def test_an_endless_device_is_refused(reader: str) -> None:
    read, error = READERS[reader]
    with in_time(5), pytest.raises(error, match="not a regular file"):
        read(Path("/dev/zero"))


def write_trace(path: Path, experts: int = 8, **arrays: Any) -> Path:
    """A trace of one call, with arrays of one's own in place of sound ones."""
    sound = {
        "layer": np.zeros(1, np.int16),
        "tokens": np.ones(1, np.int32),
        "ids": np.zeros((1, 2), np.int16),
        "weights": np.ones((1, 2), np.float16),
        "score_ids": np.zeros((1, 0), np.int16),
        "scores": np.zeros((1, 0), np.float16),
        "predicted": np.zeros((1, 0, 2), np.int16),
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": "m",
        "layers": 1,
        "experts": experts,
        "top_k": 2,
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps({**header, "expert_bytes": 1, "source": "test"}))
        for name, values in {**sound, **arrays}.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, values)
            archive.writestr(f"0/{name}", member.getvalue())
        archive.writestr("footer.json", json.dumps({"calls": 1, "chunks": 1}))
    return path


def many(rows: int, scores: int = 0) -> dict[str, Any]:
    """One call of so many tokens."""
    return {
        "tokens": np.full(1, rows, np.int32),
        "ids": np.zeros((rows, 2), np.int16),
        "weights": np.ones((rows, 2), np.float16),
        "score_ids": np.zeros((rows, scores), np.int16),
        "scores": np.zeros((rows, scores), np.float16),
        "predicted": np.zeros((rows, 0, 2), np.int16),
    }


def test_a_trace_may_not_unpack_to_any_size(tmp_path: Path) -> None:
    assert len(read_trace(write_trace(tmp_path / "sound.trace")).calls) == 1
    assert len(read_trace(write_trace(tmp_path / "many.trace", **many(1000))).calls[0].ids) == 1000
    # 80,000 rows of scores for 4,000 experts would take 1.3 GB, from a file of some KiB.
    wide = write_trace(tmp_path / "wide.trace", experts=4000, **many(80_000, scores=1))
    assert wide.stat().st_size < 32 << 10
    with pytest.raises(TraceError, match="MiB"):
        read_trace(wide)


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": np.zeros((1, 2))},
        {"weights": np.full((1, 2), np.nan, np.float16)},
        {"weights": np.ones((1, 2), np.complex64)},
        {"tokens": np.ones(1, np.float32)},
        {"layer": np.array(["0"])},
    ],
    ids=lambda arrays: f"{next(iter(arrays))} of {next(iter(arrays.values())).dtype}",
)
def test_a_trace_of_other_numbers_is_refused(arrays: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TraceError):
        read_trace(write_trace(tmp_path / "t.trace", **arrays))


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": {"us": [1e308, 1e308]}},
        {"cpu": {"first_us": 1e308}},
        {"link": {"gbps": 1e-300}},
        {"link": {"latency_us": 1e300}},
        {"spec": {"gate_bytes": 10**40}},
        {"between_layers_us": 1e308},
        {"cpu": {"tokens": [1, 10**30]}},
    ],
    ids=str,
)
def test_a_profile_of_endless_times_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Their sums and ratios are infinite or NaN, which no plan can be made of."""
    side = {"first_us": 1.0, "tokens": [1, 2], "us": [1.0, 2.0]}
    sizes = {"hidden": 32, "intermediate": 32, "experts": 8, "top_k": 2}
    types = {
        f"{part}_{what}": value
        for part in ("gate", "up", "down")
        for what, value in (("type", "Q8_0"), ("bytes", 34))
    }
    values: dict[str, Any] = {
        **{
            "format": "hybrimoe-profile",
            "version": 1,
            "name": "n",
            "label": "assumed",
            "created": "now",
        },
        **{"spec": {**sizes, **types}, "cpu": side, "accelerator": side, "between_layers_us": 0.0},
        **{"link": {"gbps": 1.0, "latency_us": 1.0}},
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    load_profile(path)
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values))
    with pytest.raises(ProfileError, match="damaged"):
        load_profile(path)
