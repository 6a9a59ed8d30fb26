"""Layers whose types the slot kernels lack stay on the CPU; the others use the accelerator."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
import torch
from loading import plain
from steps import step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.hosts.transformers.preparation.predict import predict
from hybrimoe_plugin.hosts.transformers.preparation.prepare import open_weights, prepare

LAYERS = 5
REFUSED = (0, 3)
"""The first layer too: the machine must be measured with another one."""
NOTICE = "the experts of layer 0 and 1 more stay on the CPU, those of the other 3 layers use"


def written(folder: Path, refused: tuple[int, ...]) -> Path:
    """A model with the experts of some layers in Q5_1."""

    def kind(name: str) -> str:
        if "_exps" not in name:
            return "F32"
        return "Q5_1" if int(name.split(".")[1]) in refused else "Q8_0"

    return tiny.write(folder, "qwen3_moe", types=kind, changes={"num_hidden_layers": LAYERS})


@pytest.fixture
def _no_kernel_for_q5_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(_kernels: TorchKernels, spec: ExpertSpec) -> str | None:
        return "no slot kernel for Q5_1" if spec.gate_type == "Q5_1" else None

    monkeypatch.setattr(TorchKernels, "refusal", refusal)


@torch.no_grad()
@pytest.mark.usefixtures("_no_kernel_for_q5_1")
@pytest.mark.parametrize("budget", ["layer", "shared"])
@pytest.mark.parametrize("scheduler", ["hybrimoe", "accelerator_only"])
def test_they_stay_there(
    budget: str, scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Over prompts in a row and an answer, with prefetches, fills and demand loads."""
    path = written(tmp_path, REFUSED)
    right = plain(path)
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(
            None,
            path,
            dtype="float32",
            cpu_backend="torch",
            accelerator="emulated",
            cache_ratio=0.25,
            budget=budget,
            scheduler=scheduler,
            verify="slots",
            progress=False,
        )
    (notice,) = [text for text in caplog.messages if "stay on the CPU" in text]
    assert notice.startswith(NOTICE) and "no slot kernel for Q5_1" in notice
    (engine,) = model.hybrimoe.engines
    pool = engine.controller.pool
    assert [pool.quotas[layer] for layer in REFUSED] == [0, 0]
    assert sum(pool.quotas) == 3 * 2, "the ratio is that of the layers that can have slots"
    for length in (9, 30, 14):
        prompt = tiny.tokens(length, seed=length)
        found, wanted = model(prompt, use_cache=True), right(prompt, use_cache=True)
        torch.testing.assert_close(found.logits, wanted.logits)
    for ids in tiny.tokens(12, seed=1).T:
        found = step(model, ids[None], cache_in(found))
        wanted = step(right, ids[None], cache_in(wanted))
        torch.testing.assert_close(found.logits, wanted.logits)
        assert not any(engine.controller.pool.cached[layer] for layer in REFUSED)
    counters = model.hybrimoe.stats()
    assert counters.experts_cpu and counters.experts_accelerator
    model.hybrimoe.check_integrity()
    model.hybrimoe.close()


@pytest.mark.usefixtures("_no_kernel_for_q5_1")
def test_the_prediction_knows_them(tmp_path: Path) -> None:
    path = written(tmp_path, REFUSED)
    store = open_weights(None, path)
    settings = {"accelerator": "emulated", "cache_ratio": 0.25}
    prepared = prepare(None, store, None, settings=settings)
    prediction = predict(prepared, prepared.inject().devices)
    assert [layer.cached for layer in prediction.layers] == [0, 2, 2, 0, 2]
    texts = [part.what for part in prediction.parts]
    assert "6 cached experts (15% of all)" in texts


@pytest.mark.usefixtures("_no_kernel_for_q5_1")
def test_without_any_layer_for_the_accelerator_it_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, tuple(range(LAYERS)))
    with pytest.raises(BackendError, match=r"layer 0: experts .*no slot kernel for Q5_1"):
        load_model(None, path, accelerator="emulated", progress=False)
