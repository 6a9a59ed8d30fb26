"""Layers whose types the slot kernels lack stay on the CPU; the others use the accelerator. And
experts that are requantised there.
"""

from __future__ import annotations

import logging
from pathlib import Path

import needs
import pytest
import tiny
import tiny_experts
import torch
from loading import plain
from steps import step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device import memory
from hybrimoe_plugin.engine.cpu_choice import check_copies
from hybrimoe_plugin.engine.sizing import quotas_beside
from hybrimoe_plugin.errors import BackendError, BudgetError
from hybrimoe_plugin.hosts.transformers.preparation.predict import predict
from hybrimoe_plugin.hosts.transformers.preparation.prepare import open_weights, prepare

LAYERS = 5
REFUSED = (0, 3)
"""The first layer too: the machine must be measured with another one."""
NOTICE = "the experts of 2 of 5 layers, such as layer 0, stay on the CPU: no slot kernel for Q5_1"


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
    assert notice == NOTICE
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


def test_layers_on_the_cpu_have_no_share_of_the_cache() -> None:
    settings = Settings(cache_ratio=0.5)
    sizes = [100, 50, 100, 50]
    assert quotas_beside((1,), settings, 8, sizes, None) == [4, 0, 4, 4]
    assert quotas_beside((), settings, 8, sizes, None) == [4] * 4
    # Their experts need not fit into a slot.
    few = Settings(cache_bytes=50 * 10)
    assert quotas_beside((0, 2), few, 8, sizes, 500) == [0, 3, 0, 3]


def test_a_host_that_predicts_nothing_is_told_of_copies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs.kt_kernel()
    layers = [tiny_experts.layer(types=("Q8_0", "TQ2_0", "Q8_0"), hidden=256)]
    check_copies(Settings(), layers, alone=False)
    (notice,) = caplog.messages
    assert notice.startswith("no CPU kernel for TQ2_0 (ffn_up_exps of layer 0): requantised to")
    check_copies(Settings(cpu_backend="torch"), layers, alone=False)
    check_copies(Settings(), [tiny_experts.layer(types=("Q8_0",) * 3)], alone=False)
    assert len(caplog.messages) == 1
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match=r"no CPU kernel for TQ2_0.* need 544.0 KiB of memory, 1"):
        check_copies(Settings(), layers, alone=False)
