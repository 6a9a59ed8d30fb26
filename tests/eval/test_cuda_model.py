"""Whole models under given routing: the dry run, and that graphs replay what is given."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from replayed import Replayed

from eval import cuda_model
from eval.cuda import OURS
from eval.shapes import MODELS, routing
from hybrimoe_plugin.decode import connect


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_model, "MODELS", MODELS[2:3])
    result = cuda_model.main(["--quick", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.startswith(
        "6 cells to measure (6 of whole models), 0 taken from an earlier run; about "
    )
    assert "does not judge" in out
    assert json.loads(out.splitlines()[-1]) == result
    assert result["emulated"] is True
    assert result["judged"] is False, "a quick run does not judge"
    assert result["decode_graphs_speedup"] is result["decode_speedup_geomean"] is None
    rows = list(csv.DictReader((tmp_path / "cuda_model.csv").open()))
    assert {row["method"] for row in rows} >= {
        OURS.name,
        cuda_model.NO_GRAPHS.name,
        cuda_model.KTRANSFORMERS.name,
    }
    assert {row["layers_captured"] for row in rows} == {"0"}
    static = [
        row
        for row in rows
        if row["method"] == cuda_model.KTRANSFORMERS.name and row["phase"] == "decode"
    ]
    assert all(0 < float(row["p20_ms"]) <= float(row["p80_ms"]) for row in static)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_graphs_replay_the_routing_that_is_given(
    model: cuda_model.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Replayed()
    monkeypatch.setattr(connect, "capture_for", lambda device: capture)
    given = routing(model, 8, 12, look_ahead=3, recall=0.8)
    path = tmp_path / "model.gguf"
    cuda_model.write(model, given, 2, path, dry=True)
    subject = cuda_model.Subject(path, OURS, 0.5, given, dry=True)
    seen = []
    subject.model.hybrimoe.record(seen.append)
    timing = cuda_model.measure(subject, given)
    assert timing.captured == subject.model.config.num_hidden_layers
    assert capture.replayed > 2 * 12
    decode = [call for call in seen if len(call.topk_ids) == 1]
    wanted = [call for calls in given.decode for call in calls[:2]]
    assert len(decode) == len(wanted) == 24
    for found, call in zip(decode, wanted, strict=True):
        assert np.array_equal(found.topk_ids, call.ids)
        np.testing.assert_allclose(found.topk_weights, call.weights, rtol=1e-6)
        if call.layer == 0:
            assert np.array_equal(found.predicted[0], call.predicted[0])
    subject.close()
