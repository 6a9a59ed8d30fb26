"""The GPU question's dry run, and the sums behind its last line."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eval.cuda import layers, question, summary
from eval.cuda_model import question as cuda_model
from eval.gpu_bench import bandwidth
from eval.gpu_bench import bench as bench_module
from eval.gpu_bench.bandwidth import Bandwidths
from eval.gpu_bench.baselines import PHASES, SYSTEMS
from eval.models import layers as model_layers
from eval.models import routing, shapes, synthetic
from eval.policies.systems import KTRANSFORMERS, OURS
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.counters import Counters

KEYS = {
    "decode_speedup_geomean",
    "prefill_speedup_geomean",
    "worst_cell_vs_any_baseline",
    "roofline_share",
    "link_share",
    "kernel_bandwidth_share",
    "judged",
    "emulated",
    "whole_model",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_dry_run_says_that_it_is_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(question, "MODELS", shapes.MODELS[2:3])
    monkeypatch.setattr(layers, "RATIOS", (0.5,))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result = question.run(argparse.Namespace(out=tmp_path, quick=True, fresh=False, model="demo"))
    torch.set_num_threads(before)
    out = capsys.readouterr().out
    assert out.index("cells to measure (4 of layers and 6 of whole models)") < out.index(
        "bandwidths (emulated)"
    )
    assert "does not judge" in out
    last = json.loads(out.splitlines()[-1])
    assert last == result
    assert set(last) == KEYS
    assert last["emulated"] is True
    assert last["judged"] is False, "a quick run does not judge"
    assert {last[name] for name in summary.VERDICTS} == set(last["whole_model"].values()) == {None}
    assert last["roofline_share"] > 0
    assert last["link_share"] is None and last["kernel_bandwidth_share"] is None, (
        "nothing to measure them on"
    )
    whole = list(csv.DictReader((tmp_path / "cuda_model.csv").open()))
    assert {row["cache"] for row in whole} == {"0.5"}
    rows = list(csv.DictReader((tmp_path / "cuda.csv").open()))
    assert {(row["method"], row["phase"]) for row in rows} == {
        (system.name, phase) for system in SYSTEMS for phase in PHASES
    }
    assert {row["emulated"] for row in rows} == {"True"}
    assert all(0 < float(row["p20_ms"]) <= float(row["p80_ms"]) for row in rows)
    static = next(row for row in rows if row["method"] == KTRANSFORMERS.name)
    assert float(static["link_mb_per_pass"]) == 0.0


def test_measuring_runs_on_stand_ins(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The path of a real GPU, with the emulated device in its place: every call of it is made, no
    number means much.
    """
    emulated = bench_module.make_accelerator("emulated", torch.device("cpu"))
    small = shapes.MODELS[2]._replace(hidden=256, intermediate=256)
    monkeypatch.setattr(question, "MODELS", (small,))
    monkeypatch.setattr(layers, "RATIOS", (0.5,))
    for module in (layers, summary):
        monkeypatch.setattr(module, "SYSTEMS", (KTRANSFORMERS, OURS))
    monkeypatch.setattr(bench_module, "DEVICE", "cpu")
    monkeypatch.setattr(question, "cuda_refusal", lambda: None)
    monkeypatch.setattr(bench_module, "make_accelerator", lambda name, device: emulated)
    monkeypatch.setattr(question, "limit_cpu", lambda: None)
    monkeypatch.setattr(bench_module, "fits", lambda *_: 2)
    monkeypatch.setattr(cuda_model, "write", lambda *_: 1 / 0)
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(bandwidth, "REPEATS", 2)
    monkeypatch.setattr(bandwidth, "L2_BYTES", 1 << 18)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(
        bandwidth,
        "_device_us",
        lambda work, device, ahead=False: bandwidth._host_us(work),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result = question.run(argparse.Namespace(out=tmp_path, quick=True, fresh=False, model="demo"))
    torch.set_num_threads(before)
    assert result["emulated"] is False
    assert set(result) == KEYS
    assert result["whole_model"] is None, "a failure is said, and the layers' times stand"
    assert all(
        result[name] > 0 for name in ("roofline_share", "link_share", "kernel_bandwidth_share")
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    rows = list(csv.DictReader((tmp_path / "cuda.csv").open()))
    assert {int(row["repetitions"]) for row in rows} == {3, 6}
    assert {row["layers"] for row in rows} == {"2"}


def test_steps_that_count_come_after_others_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that remembers what it saw must not have seen what counts."""
    seen: list[str] = []

    def passes(
        kind: str,
        count: int,
    ) -> list[str]:
        return [f"{kind} {number}" for number in range(count)]

    def run(
        engine: Any,
        calls: str,
    ) -> float:
        seen.append(calls)
        return float(len(seen))

    engine = SimpleNamespace(controller=SimpleNamespace(counters=Counters()))
    for quick, steps, warm_up in ((False, 64, layers.WARM_UP), (True, 12, 6)):
        seen.clear()
        bench: Any = SimpleNamespace(quick=quick, engine=lambda system, ratio: engine, run=run)
        bench.routing = SimpleNamespace(prompts=passes("prompt", 4), decode=passes("step", steps))
        found = layers.measure(bench, OURS, 0.5)
        prompts, decode = seen[:-steps], seen[-steps:]
        assert decode == passes("step", steps), "each step once: none is seen before it counts"
        assert len(found["decode"].us) == steps - warm_up
        assert prompts[0] == "prompt 3" and len(found["prefill"].us) == len(prompts) - 1 == (
            3 if quick else 20
        )


def test_roofline_is_the_slower_of_misses_and_everything() -> None:
    bench: Any = SimpleNamespace(expert_bytes=1e6)
    wide = Bandwidths(cpu=50_000.0, accelerator=1_000_000.0, link=50_000.0)
    # 8 experts, half of them missing, over two passes.
    counts = Counters(activations=16, cache_hits=8)
    assert layers.roofline_us(bench, wide, counts, 2) == pytest.approx(4e6 / 100_000)
    narrow = wide._replace(accelerator=100_000.0)
    assert layers.roofline_us(bench, narrow, counts, 2) == pytest.approx(8e6 / 150_000)


def test_summary_takes_the_worst_cell_over_every_baseline() -> None:
    times = {system.name: 2.0 for system in SYSTEMS} | {OURS.name: 1.0}
    rows = [
        {
            "model": "m",
            "cache": cache,
            "phase": phase,
            "method": name,
            "p50_ms": ms,
            "roofline_ms": 0.5,
        }
        for cache in (0.25, 0.5)
        for phase in PHASES
        for name, ms in times.items()
    ]
    rows[-2]["p50_ms"] = 0.9  # one baseline is ahead in one cell
    found = summary.summary(rows)
    assert found["decode_speedup_geomean"] == found["prefill_speedup_geomean"] == 2.0
    assert found["worst_cell_vs_any_baseline"] == 0.9
    assert found["roofline_share"] == 0.5


def test_shapes_have_the_bytes_of_the_models() -> None:
    qwen = shapes.MODELS[0]
    found = routing.routing(qwen, 40, 3, look_ahead=2, recall=0.8)
    assert [[len(call.ids) for call in prompt] for prompt in found.prompts] == [
        [40] * 47
    ] * routing.PROMPTS
    first, last = found.prompts[0][0].ids, found.prompts[-1][0].ids
    assert not np.array_equal(first, last)
    assert [len(group) for group in found.decode] == [47] * 3
    assert [len(call.predicted) for call in found.decode[0][-3:]] == [2, 1, 0]
    for recorded, experts, top_k in ((shapes.MODELS[1], 64, 6), (shapes.MODELS[2], 8, 2)):
        own = routing.routing(recorded, 40, 3, look_ahead=2, recall=0.8)
        assert (own.header.experts, own.header.top_k, own.header.predictions) == (
            experts,
            top_k,
            "recorded",
        )
        assert own.header.expert_bytes > 3e6, (
            "of the shape, not of the small model that was recorded"
        )
        assert own.header.expert_bytes / routing.published_costs(recorded).transfer_us < 32e3, (
            "no link is faster"
        )
        assert [len(group[0].ids) for group in own.prompts] == [40] * routing.PROMPTS
        assert [[ids.shape for ids in call.predicted] for call in own.prompts[1][-3:]] == [
            [(40, top_k)] * 2,
            [(40, top_k)],
            [],
        ]
    assert shapes.layer_bytes(qwen, 128) == pytest.approx(
        128 * 3 * 2048 * 768 * (5 * 144 + 210) / 6 / 256
    )
    small = qwen._replace(hidden=256, intermediate=256)
    one, two = model_layers.layers_of(small, found.header, 2, tiny=False)
    assert (one.spec.down_type, two.spec.down_type) == ("Q4_K", "Q6_K")
    for layer in (one, two):
        assert layer.spec.experts == 128
        for matrix in layer.dequantized(5):
            assert torch.isfinite(matrix).all()
            assert 0.1 < float(matrix.std()) * 16 < 3
    assert not np.shares_memory(one.gate.stacked, two.gate.stacked)
    other = routing.routing(shapes.MODELS[3], 40, 3, look_ahead=2, recall=0.8)
    assert other.header.experts == 128 and other.header.model != found.header.model
    assert shapes.fits(qwen, 128, 48, 1e9) == 2


def test_models_are_chosen_by_shape() -> None:
    assert question.named("demo") == list(shapes.MODELS)
    assert [model.trace for model in question.named("mixtral-8x7b")] == [
        "smollm2-mixtral",
        "mixtral-8x7b",
    ]
    with pytest.raises(ConfigError, match="qwen2-57b-a14b"):
        question.named("qwen2-57b-a14b")
    for model in shapes.MODELS:
        assert model.shape in synthetic.SHAPES
