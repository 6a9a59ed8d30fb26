"""Public data and generators: what is stated is what is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.replay.sources import (
    counts,
    read_popularity,
    read_route_csv,
    synthetic,
    with_predictions,
)
from hybrimoe_plugin.replay.trace import Trace

CSV = """# route_trace v1
# model=/somewhere/tiny.gguf arch=x n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=5
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.75,0,100
0,0,0,0,1,1,0.25,0,100
0,0,1,0,0,2,0.5,0,100
0,0,1,0,1,3,0.5,0,0
0,0,1,1,0,0,0.5,0,0
0,0,1,1,1,1,0.5,0,0
0,1,2,0,0,0,0.625,0,0
0,1,2,0,1,1,0.375,0,0
0,1,2,1,0,2,0.5,0,0
0,1,2,1,1,3,0.5,0,0
"""


def generated(**statistics: float) -> Trace:
    options = {"prompt_tokens": 0, "decode_tokens": 300, **statistics}
    return synthetic(4, 16, 2, model="made", expert_bytes=10, **options)  # type: ignore[arg-type]


def repeats(trace: Trace) -> float:
    """Share of chosen experts that the token before had chosen in the same layer."""
    calls = [call for call in trace.calls if call.layer == 1]
    found = [
        len({*a.ids[0].tolist()} & {*b.ids[0].tolist()}) / 2
        for a, b in zip(calls, calls[1:], strict=False)
    ]
    return float(np.mean(found))


def test_csv_is_read_token_by_token(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    trace = read_route_csv(tmp_path / "t.csv")
    assert (trace.header.model, trace.header.layers, trace.header.experts, trace.header.top_k) == (
        "tiny",
        2,
        4,
        2,
    )
    assert [(call.layer, call.ids.tolist()) for call in trace.calls] == [
        (0, [[3, 1], [2, 3]]),
        (1, [[0, 1]]),
        (0, [[0, 1]]),
        (1, [[2, 3]]),
    ]
    assert trace.calls[0].weights[0].tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("old", "new"),
    [("0,0,0,0,0,3,", "0,0,0,0,0,9,"), ("route_trace v1", "v2"), (",1,1,0.25", ",1,x,y")],
)
def test_unsound_csv_is_a_typed_error(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "t.csv").write_text(CSV.replace(old, new))
    with pytest.raises(TraceError, match=r"t\.csv"):
        read_route_csv(tmp_path / "t.csv")


def test_popularity_is_normalised(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"expert_popularity": [[1, 3], [2, 2]]}))
    np.testing.assert_allclose(read_popularity(tmp_path / "p.json"), [[0.25, 0.75], [0.5, 0.5]])


def test_flat_routing_is_flat_and_skewed_is_not() -> None:
    flat, skewed = (counts(generated(skew=skew).calls, generated().header) for skew in (0.0, 1.5))
    assert flat.max() < 2 / 16
    assert skewed.max() > 3 / 16
    np.testing.assert_allclose(flat.sum(axis=1), 1.0)


def test_locality_and_drift_repeat_experts() -> None:
    chance = 2 / 16
    assert repeats(generated()) == pytest.approx(chance, abs=0.06)
    assert repeats(generated(locality=0.9)) > 3 * chance
    assert repeats(generated(drift=0.7)) > 2 * chance


def test_texts_differ_and_seeds_repeat() -> None:
    same, other = generated(text=1), generated(text=2)
    assert all(
        (a.ids == b.ids).all() for a, b in zip(same.calls, generated(text=1).calls, strict=True)
    )
    assert any((a.ids != b.ids).any() for a, b in zip(same.calls, other.calls, strict=True))


@pytest.mark.parametrize("recall", [0.0, 0.5, 0.79, 1.0])
def test_modelled_predictions_have_the_stated_recall(recall: float) -> None:
    trace = with_predictions(generated(), recall)
    assert f"modelled at recall {recall}" in trace.header.predictions
    for distance in (1, 2, 3):
        hits = total = 0
        for group in trace.passes():
            for call in group[: len(group) - distance]:
                predicted = call.predicted[distance - 1]
                assert len(set(predicted[0].tolist())) == 2, "no expert twice"
                hits += len(
                    set(predicted[0].tolist()) & set(group[call.layer + distance].ids[0].tolist())
                )
                total += 2
        assert hits / total == pytest.approx(recall**distance, abs=0.07)


def test_predictions_where_no_other_expert_is_left() -> None:
    everything = synthetic(2, 3, 3, model="all", expert_bytes=1, prompt_tokens=2, decode_tokens=2)
    for call in with_predictions(everything, 0.0).calls:
        for predicted in call.predicted:
            assert sorted(predicted[0].tolist()) == [0, 1, 2]
