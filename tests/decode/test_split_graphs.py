"""Our own attention in graphs, interpreted; and what a step sets once for all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from graphed import Loader, cuda_layers_of, greedy
from replayed import Replayed

from hybrimoe_plugin.compute.attention import flashinfer_pages, kernel_choice
from hybrimoe_plugin.compute.attention.decode_attention import GQAShape, MaskedAttention, MLAShape

pytest.importorskip("triton")
from hybrimoe_plugin.compute.attention import split_attention
from hybrimoe_plugin.compute.attention.split_attention import SplitAttention, Tiles

CPU = torch.device("cpu")
SHAPE = GQAShape(8, 2, 16, 64, torch.float32, 0.25)


class Faster(Replayed):
    """torch's attention takes two seconds, our own one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def time_us(self, replay: Callable[[], None]) -> float:
        replay()
        self.asked += 1
        return 2e6 if self.asked % 2 else 1e6


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter serves as a device, with several ranges in caches of a few tokens."""
    monkeypatch.setattr(kernel_choice, "triton_runs", lambda device: True)
    monkeypatch.setattr(flashinfer_pages, "installed", lambda: False)
    monkeypatch.setattr(split_attention, "PROGRAMS", 16)
    monkeypatch.setattr(Tiles, "of", lambda *_: Tiles(heads=16, tokens=16))


def names(shape: Any) -> list[str]:
    found = kernel_choice.candidates(shape, CPU, torch.zeros(1, dtype=torch.int64))
    return [name for name, _ in found]


@pytest.mark.usefixtures("triton")
def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = SplitAttention.name
    latent = MLAShape(16, 512, 64, 64, torch.bfloat16, 0.1)
    assert names(SHAPE) == [ours]
    assert names(SHAPE._replace(width=256)) == [ours]
    assert names(SHAPE._replace(width=257)) == [], "too wide"
    assert names(latent) == [ours]
    assert names(latent._replace(latent=513)) == [], "too wide"
    assert names(SHAPE._replace(dtype=torch.float64)) == []
    monkeypatch.setattr(flashinfer_pages, "installed", lambda: True)
    assert names(latent) == [ours, "flashinfer"]
    assert names(SHAPE) == [ours], "flashinfer's are for 16-bit types"
    monkeypatch.undo()
    assert not kernel_choice.triton_runs(CPU), "the interpreter is no faster than torch"


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite", marks=pytest.mark.slow),
        "deepseek_v3",
    ],
)
def test_tokens_are_the_plain_models(family: str, load_captured: Loader) -> None:
    """Through growth: 7 to 36 tokens, so 16, 32 and 64, each with kernels of its own."""
    model = load_captured(family, Faster())
    prompt = tiny.tokens(7)
    assert greedy(model, prompt, 30) == greedy(tiny.model(family), prompt, 30)
    layers = cuda_layers_of(model)
    assert all(layer.captured for layer in layers)
    kernels = {layer._graphs.kernel for layer in layers}  # type: ignore[union-attr]
    (kernel,) = kernels
    assert isinstance(kernel, SplitAttention)
    assert kernel._ranges == 4, "64 tokens in tiles of 16"


@pytest.mark.usefixtures("triton")
def test_the_fastest_of_several_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((20.0, 9.0, 20.0, 6.0))
    capture = Replayed()
    monkeypatch.setattr(capture, "time_us", lambda replay: next(times))
    monkeypatch.setattr(kernel_choice, "plan_us", lambda kernel: 0.0)
    made = [SplitAttention(SHAPE, CPU, torch.zeros(1, dtype=torch.int64), 2) for _ in range(2)]

    def candidates(shape: Any, device: Any, position: torch.Tensor) -> Any:
        for kernel in made:
            kernel._position = position
            yield kernel.name, lambda kernel=kernel: kernel

    monkeypatch.setattr(kernel_choice, "candidates", candidates)
    position = torch.zeros(1, dtype=torch.int64)
    assert kernel_choice.choose(SHAPE, CPU, capture, position) is made[1]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("fault", ["late", "frozen"])
def test_kernels_that_are_wrong_at_some_position_are_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = SplitAttention.__call__

    def wrong(kernel: SplitAttention, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        there = kernel._position
        # One entry too few, or the position at the time of the capture.
        kernel._position = (there - 1).clamp(min=0) if fault == "late" else there.clone() * 0 + 32
        try:
            return call(kernel, query, *cache)
        finally:
            kernel._position = there

    monkeypatch.setattr(SplitAttention, "__call__", wrong)
    position = torch.zeros(1, dtype=torch.int64)
    chosen = kernel_choice.choose(SHAPE, CPU, Faster(), position)
    assert isinstance(chosen, MaskedAttention)
    assert "differs from torch's attention" in caplog.text


def test_masks_are_made_once_a_step(load_captured: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every layer, and in none of the graphs."""
    planned: list[int] = []
    plan = MaskedAttention.plan

    def noted(kernel: MaskedAttention, held: int) -> None:
        planned.append(held)
        plan(kernel, held)

    monkeypatch.setattr(MaskedAttention, "plan", noted)
    operations: list[str] = []

    def look(_number: int, done: Any, replay: Callable[[], None]) -> Callable[[], None]:
        operations.extend(str(func) for func, *_ in done)
        return replay

    model = load_captured("mixtral", Replayed(look))
    layers = len(cuda_layers_of(model))
    greedy(model, tiny.tokens(20), 8)
    # 20 to 26 tokens are held, in one capacity. The first step captures: each layer then sets a
    # dummy step, and the step again.
    assert planned[: 2 * layers] == [31, 20] * layers
    assert planned[2 * layers :] == list(range(21, 27))
    assert not [name for name in operations if "arange" in name or "le." in name]
    assert layers > 1
