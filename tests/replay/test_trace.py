"""Trace files: exact round trips, bounded memory, a typed error for everything else."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.replay.sources import load_trace, read_popularity, synthetic, with_predictions
from hybrimoe_plugin.replay.trace import (
    Call,
    Trace,
    TraceHeader,
    TraceWriter,
    read_trace,
    write_trace,
)

HEADER = TraceHeader("tiny", 3, 8, 2, 1000, "made here", "recorded")
SOUND = {"format": "hybrimoe-trace", "version": 1, **asdict(HEADER)}


def tiny(decode_tokens: int = 5) -> Trace:
    trace = synthetic(
        3, 8, 2, model="tiny", expert_bytes=1000, prompt_tokens=4, decode_tokens=decode_tokens
    )
    return with_predictions(trace, 0.8)


def test_round_trip(tmp_path: Path) -> None:
    trace = tiny(200)
    write_trace(tmp_path / "t.trace", trace.header, trace.calls, score_top=8)
    back = read_trace(tmp_path / "t.trace")
    assert back.header == trace.header
    assert len(back.calls) == len(trace.calls) > 512, "several chunks"
    for ours, theirs in zip(trace.calls, back.calls, strict=True):
        assert ours.layer == theirs.layer
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-3)
        assert ours.scores is not None
        assert theirs.scores is not None
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-3)
        assert len(ours.predicted) == len(theirs.predicted)
        for a, b in zip(ours.predicted, theirs.predicted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_only_the_highest_scores_are_kept(tmp_path: Path) -> None:
    trace = tiny()
    write_trace(tmp_path / "t.trace", trace.header, trace.calls, score_top=3)
    for ours, theirs in zip(trace.calls, read_trace(tmp_path / "t.trace").calls, strict=True):
        assert ours.scores is not None
        assert theirs.scores is not None
        assert ((theirs.scores > 0).sum(axis=1) == 3).all()
        np.testing.assert_allclose(theirs.scores.max(axis=1), ours.scores.max(axis=1), atol=1e-3)


def test_a_long_run_does_not_grow_in_memory(tmp_path: Path) -> None:
    call = tiny().calls[-1]._replace(layer=0, scores=None, predicted=())
    with TraceWriter(tmp_path / "t.trace", HEADER) as writer:
        for _ in range(2000):
            writer.write(call)
        tracemalloc.start()
        for _ in range(20_000):
            writer.write(call)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # 20,000 calls are 40 chunks of the archive's directory, not 20,000 calls.
    assert grown < 1_000_000


def test_passes_begin_where_layers_start_again() -> None:
    assert [len(group) for group in tiny(2).passes()] == [3, 3, 3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("trace") / "t.trace"
    trace = tiny()
    write_trace(path, trace.header, trace.calls, score_top=4)
    return path.read_bytes()


@given(cut=st.integers(0, 5000))
def test_a_cut_file_is_a_typed_error(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.trace"
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(TraceError):
        read_trace(path)


@given(at=st.integers(0, 5000), by=st.binary(min_size=1, max_size=8))
def test_damaged_bytes_give_a_trace_or_a_typed_error(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, at: int, by: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "hurt.trace"
    path.write_bytes(whole[:at] + by + whole[at + len(by) :])
    with contextlib.suppress(TraceError):
        for call in read_trace(path).calls:
            assert call.ids.shape == call.weights.shape


def rewritten(whole: bytes, path: Path, member: str, content: bytes) -> Path:
    """A sound archive with one member replaced: what a checksum does not catch."""
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name == member else old.read(name))
    return path


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, allow_pickle=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "content", "found"),
    [
        ("header.json", json.dumps({"format": "other"}).encode(), "not a hybrimoe-trace"),
        (
            "header.json",
            json.dumps({"format": "hybrimoe-trace", "version": 9}).encode(),
            "version 9",
        ),
        ("header.json", b"[]", "no trace"),
        ("header.json", json.dumps({**SOUND, "expert_bytes": [0]}).encode(), "expert_bytes is"),
        ("header.json", json.dumps({**SOUND, "expert_bytes": -1}).encode(), "expert_bytes is"),
        ("header.json", json.dumps({**SOUND, "source": None}).encode(), "must be texts"),
        ("footer.json", json.dumps({"calls": 1, "chunks": 1}).encode(), "its footer says 1"),
        ("footer.json", json.dumps({"calls": 1, "chunks": 10**12}).encode(), "no trace"),
        ("0/ids", array(np.full((27, 2), 99, np.int16)), "out of range"),
        ("0/ids", array(np.zeros((1, 2), np.int16)), "do not fit"),
        ("0/tokens", array(np.full(18, -1, np.int32)), "do not fit"),
        ("0/layer", array(np.full(18, 7, np.int16)), "out of range"),
        ("0/layer", array(np.zeros((18, 2), np.int16)), "do not fit"),
        (
            "0/predicted",
            array(np.zeros((27, 3, 2), np.int16)),
            "layers that the model does not have",
        ),
        ("0/scores", array(np.zeros(27, np.float16)), "do not fit"),
        ("0/scores", b"no array", "no trace"),
        ("0/scores", array(np.zeros((27, 8), np.float16)).replace(b", }", b"{  "), "no trace"),
    ],
)
def test_what_is_wrong_inside_is_named(
    whole: bytes, tmp_path: Path, member: str, content: bytes, found: str
) -> None:
    with pytest.raises(TraceError, match=found):
        read_trace(rewritten(whole, tmp_path / "t.trace", member, content))


@given(content=st.binary(max_size=300))
def test_foreign_files_are_typed_errors(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    for suffix in ("trace", "csv", "json"):
        path = tmp_path_factory.getbasetemp() / f"foreign.{suffix}"
        path.write_bytes(content)
        with pytest.raises(TraceError):
            read_popularity(path) if suffix == "json" else load_trace(path)


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such"):
        read_trace(tmp_path / "none.trace")
    with pytest.raises(TraceError, match="cannot write"):
        TraceWriter(tmp_path / "none" / "t.trace", HEADER)


def test_a_call_without_scores_makes_its_chunk_without(tmp_path: Path) -> None:
    calls = [Call(0, np.array([[1, 2]]), np.ones((1, 2), np.float32), None, ())]
    write_trace(tmp_path / "t.trace", HEADER, calls, score_top=4)
    assert read_trace(tmp_path / "t.trace").calls[0].scores is None
