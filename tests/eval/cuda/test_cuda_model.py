"""Whole models under given routing: the dry run, and that graphs replay what is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from replayed import Replayed

from eval.cuda_model import question
from eval.cuda_model.model_file import write
from eval.cuda_model.subject import Subject, measure
from eval.gpu_bench.baselines import NO_GRAPHS
from eval.models.routing import routing
from eval.models.shapes import MODELS, Model
from eval.policies.systems import KTRANSFORMERS, OURS
from eval.reporting.report import read_csv
from eval.reporting.rows import column, where
from hybrimoe_plugin.decode import connect


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_dry_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(question, "MODELS", MODELS[2:3])
    result = question.main(["--quick", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    begin = "6 cells to measure (6 of whole models), 0 taken from an earlier run; about "
    assert out.startswith(begin)
    assert "does not judge" in out
    *_, last = out.splitlines()
    assert json.loads(last) == result
    assert result["emulated"] is True
    assert result["judged"] is False, "a quick run does not judge"
    assert result["decode_graphs_speedup"] is None
    assert result["decode_speedup_geomean"] is None
    rows = read_csv(tmp_path / "cuda_model.csv")
    methods = set(column(rows, "method"))
    assert methods >= {
        OURS.name,
        NO_GRAPHS.name,
        KTRANSFORMERS.name,
    }
    assert set(column(rows, "layers_captured")) == {0}
    static = where(rows, method=KTRANSFORMERS.name, phase="decode")
    assert static
    for row in static:
        assert 0 < row["p20_ms"] <= row["p80_ms"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_graphs_replay_the_routing_that_is_given(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every decode step takes the experts that were given, although its layers run as graphs."""
    capture = Replayed()
    monkeypatch.setattr(connect, "capture_for", lambda device: capture)
    given = routing(model, 8, 12, look_ahead=3, recall=0.8)
    path = tmp_path / "model.gguf"
    write(model, given, 2, path, dry=True)
    subject = Subject(path, OURS, 0.5, given, dry=True)
    seen = []
    subject.model.hybrimoe.record(seen.append)
    timing = measure(subject, given)
    layers = subject.model.config.num_hidden_layers
    assert timing.captured == layers
    assert capture.replayed > 2 * 12
    decode = [call for call in seen if len(call.topk_ids) == 1]
    wanted = []
    for calls in given.decode:
        wanted += calls[:2]  # as many layers as the file has
    assert len(decode) == 24
    assert len(wanted) == 24
    for found, call in zip(decode, wanted, strict=True):
        assert np.array_equal(found.topk_ids, call.ids)
        np.testing.assert_allclose(found.topk_weights, call.weights, rtol=1e-6)
        if call.layer == 0:
            next_layer = call.predicted[0]
            assert np.array_equal(found.predicted[0], next_layer)
    subject.close()
