"""flashinfer's attention in graphs, with a module in its place that checks what it is told and
computes plainly.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_flashinfer
import pytest
import tiny
import torch
from replayed import Replayed
from steps import step

from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.attention import flashinfer_pages, kernel_choice
from hybrimoe_plugin.compute.attention.attend import attend_latents
from hybrimoe_plugin.compute.attention.decode_attention import (
    AttentionKernel,
    GQAShape,
    MLAShape,
)
from hybrimoe_plugin.compute.attention.flashinfer_gqa import FlashinferGQA
from hybrimoe_plugin.compute.attention.flashinfer_mla import FlashinferMLA
from hybrimoe_plugin.compute.attention.flashinfer_pages import PAGE
from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.decode import connect, layer_buffers
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer

SHAPE = GQAShape(heads=8, groups=2, width=16, capacity=64, dtype=torch.bfloat16, scaling=0.25)
LATENT = MLAShape(heads=4, latent=128, rope=64, capacity=64, dtype=torch.bfloat16, scaling=0.1)
SHAPES = pytest.mark.parametrize("shape", [SHAPE, LATENT], ids=["grouped", "latent"])
CPU = torch.device("cpu")
SECOND = 1e6


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = fake_flashinfer.make()
    monkeypatch.setattr(flashinfer_pages, "WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(flashinfer_pages, "installed", lambda: True)
    monkeypatch.setitem(sys.modules, "flashinfer", made)
    return made


def wrapper(flashinfer: Any, shape: Any) -> Any:
    return flashinfer.decode if shape is SHAPE else flashinfer.latent


class Timed(Replayed):
    """Times are as given, in the order in which they are asked for: torch's, flashinfer's."""

    def __init__(self, *times: float) -> None:
        super().__init__()
        self.times = list(times)

    def time_us(self, replay: Callable[[], None]) -> float:
        replay()
        return self.times.pop(0)


def choose(shape: Any, capture: Timed, layers: int = 1) -> AttentionKernel:
    return kernel_choice.choose(shape, CPU, capture, torch.zeros(1, dtype=torch.int64), layers)


@SHAPES
def test_the_faster_one_is_chosen(
    shape: Any, flashinfer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = FlashinferGQA | FlashinferMLA
    assert isinstance(choose(shape, Timed(2 * SECOND, SECOND)), kinds)
    assert choose(shape, Timed(SECOND, 2 * SECOND)).name == "torch"
    if shape is SHAPE:
        assert [made.tensor_cores for made in flashinfer.decode.made] == [True, True], (
            "four heads share a key head"
        )
    for other in (shape._replace(dtype=torch.float32), shape._replace(capacity=PAGE * 3 + 1)):
        assert choose(other, Timed()).name == "torch", "not tried"
    assert len(wrapper(flashinfer, shape).made) == 2
    # A step's plan is paid once and shared by the layers.
    monkeypatch.setattr(kernel_choice, "plan_us", lambda _kernel: 30.0)
    assert choose(shape, Timed(20.0, 10.0), layers=2).name == "torch"
    assert choose(shape, Timed(20.0, 10.0), layers=4).name == "flashinfer"


@SHAPES
def test_what_is_wrong_or_fails_is_not_used(
    shape: Any, flashinfer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = wrapper(flashinfer, shape)
    kind.wrong = 0.5
    assert choose(shape, Timed(2 * SECOND, SECOND)).name == "torch"
    assert "differs from torch's attention" in caplog.text
    monkeypatch.setattr(kind, "run", lambda *_, **__: 1 / 0)
    capture = Timed(2 * SECOND, SECOND)
    assert choose(shape, capture).name == "torch"
    assert "division by zero" in caplog.text
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert choose(shape, Timed()).name == "torch"


def test_a_kernel_that_cannot_be_planned_again_is_not_used(
    flashinfer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashinfer.latent.once = True
    assert choose(LATENT, Timed(2 * SECOND, SECOND)).name == "torch"
    assert "cannot replan" in caplog.text
    flashinfer.latent.once = False
    narrow = LATENT._replace(latent=32)
    assert choose(narrow, Timed(2 * SECOND, SECOND)).name == "torch"
    assert "multiple of 128" in caplog.text
    # One whose graph keeps the numbers of the plan that it was captured with.
    plan = flashinfer.decode.plan

    def plan_once(self: Any, *given: Any, **more: Any) -> None:
        if not self.plans:
            plan(self, *given, **more)

    monkeypatch.setattr(flashinfer.decode, "plan", plan_once)
    caplog.clear()
    assert choose(SHAPE, Timed(2 * SECOND, SECOND)).name == "torch"
    assert "differs from torch's attention" in caplog.text


@pytest.mark.parametrize("held", [0, 1, PAGE - 1, PAGE, 63])
def test_pages_are_the_cache_by_its_strides(held: int, flashinfer: Any) -> None:
    kernel = FlashinferGQA(flashinfer, SHAPE, CPU)
    query, keys, values = SHAPE.example(CPU)
    assert flashinfer_pages.pages(keys).data_ptr() == keys.data_ptr()
    kernel.plan(held)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys[:, :, : held + 1], values[:, :, : held + 1], scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(kernel(query, keys, values), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("held", [0, 1, PAGE - 1, PAGE, 63])
def test_latents_are_paged_in_the_same_way(held: int, flashinfer: Any) -> None:
    kernel = FlashinferMLA(flashinfer, LATENT, CPU)
    query, compressed = LATENT.example(CPU)
    kernel.plan(held)
    wanted = attend_latents(
        query.float(), compressed[:, :, : held + 1].float(), None, LATENT.scaling, LATENT.latent
    )
    torch.testing.assert_close(kernel(query, compressed).float(), wanted, rtol=0.02, atol=0.02)


def decode(model: Any, steps: int = 40) -> list[float]:
    """Logits of a prompt's answer, teacher-forced."""
    with torch.no_grad():
        out = model(tiny.tokens(7), use_cache=True)
        logits = []
        for token in tiny.tokens(steps, seed=1)[0]:
            out = step(model, token[None, None], cache_in(out))
            logits.append(out.logits[0, -1].float())
    return torch.stack(logits).flatten().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2_lite", "deepseek_v3"])
def test_a_model_decodes_with_it(
    family: str,
    breaks: bool,
    flashinfer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In graphs, through growth; one that goes wrong after it was chosen is left and the layers are
    captured anew.
    """
    monkeypatch.setattr(layer_buffers, "FIRST_CAPACITY", 16)
    kind = flashinfer.decode if family == "qwen3_moe" else flashinfer.latent
    changes = None if family == "qwen3_moe" else {"kv_lora_rank": 128, "qk_rope_head_dim": 64}
    path = tiny.write(tmp_path, family, changes=changes)
    choices = {
        "accelerator": "emulated",
        "dense": "dequantised",
        "cpu_backend": "torch",
        "dtype": "bfloat16",
    }
    answers, captures = [], []
    for attention in ("auto", "torch"):
        captures.append(Timed(*[2 * SECOND, SECOND] * 3))
        monkeypatch.setattr(connect, "capture_for", lambda device: captures[-1])
        model, _ = load_model(None, path, progress=False, attention=attention, **choices)
        if breaks and attention == "auto":
            compare = kernel_choice.compare

            def spoiled(*given: Any, compare: Any = compare) -> tuple[float, float]:
                times: tuple[float, float] = compare(*given)
                kind.wrong = 0.5
                return times

            monkeypatch.setattr(kernel_choice, "compare", spoiled)
        answers.append(torch.tensor(decode(model)))
        assert all(
            module.captured for module in model.modules() if isinstance(module, GraphedLayer)
        )
        model.hybrimoe.close()
    assert (answers[0] - answers[1]).norm() / answers[1].norm() < 0.05
    if breaks:
        assert "flashinfer is not used on cpu any more" in caplog.text
        assert "CUDA graphs are not used" not in caplog.text
    else:
        assert not caplog.records or caplog.records[-1].levelno < logging.WARNING
        assert len(kind.made) == 3, "capacities of 16, 32 and 64 tokens"
        assert sum(made.plans for made in kind.made) > 40
