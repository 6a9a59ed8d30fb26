"""What the GPU's benchmark counts: nothing is brought to the device while its clock runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_experts
import torch

from eval.gpu_bench import bandwidth
from eval.gpu_bench.bench import Bench, _TraceRouter
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.replay.trace import Call

LAYERS, TOKENS, WIDTH, TOP_K = 3, 2, 8, 2


def call(layer: int) -> Call:
    def ids(first: int) -> Any:
        return np.arange(first, first + TOKENS * TOP_K, dtype=np.int64).reshape(TOKENS, TOP_K)

    later = tuple(ids(100 * (layer + distance)) for distance in range(1, LAYERS - layer))
    return Call(layer, ids(0), np.full((TOKENS, TOP_K), 0.5, np.float32), None, later)


class Device:
    """An accelerator that notes what is placed and when the host waits for it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        self.log.append("place")
        return tensor

    def synchronize(self) -> None:
        self.log.append("wait")


class Layers:
    """An engine that notes its calls, and what its routers say by then."""

    def __init__(self, device: Device) -> None:
        self.routers = [_TraceRouter() for _ in range(LAYERS)]
        self.clock = SimpleNamespace(now_us=lambda: 0.0)
        self.said: list[list[int]] = []
        self.device = device

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        self.device.log.append("run")
        assert ids.dtype == torch.int64 and weights.tolist() == [[0.5] * TOP_K] * TOKENS
        self.said.append(
            [int(router.predict(hidden)[0, 0]) for router in self.routers[layer + 1 :]]
        )
        return hidden


def test_inputs_are_there_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    engine: Any = Layers(device)
    bench = Bench.__new__(Bench)
    bench.dry, bench.device = True, torch.device("cpu")
    bench.accelerator = device  # type: ignore[assignment]
    bench.layers = [SimpleNamespace(spec=SimpleNamespace(hidden=WIDTH))] * LAYERS  # type: ignore[list-item]
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("a pageable copy"))
    bench.run(engine, [call(layer) for layer in range(LAYERS)])
    begin = device.log.index("wait")
    assert device.log[:begin] == ["place"] * (2 * LAYERS + 2 + 1)
    assert device.log[begin:] == ["wait", *["run"] * LAYERS, "wait"]
    assert engine.said == [[100, 200], [200], []]


def test_a_layers_shares_can_be_rehearsed_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "REPEATS", 2)
    accelerator = make_accelerator("emulated", torch.device("cpu"))
    assert accelerator is not None
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    found = bandwidth.layer_shares(accelerator, weights, bandwidth.Bandwidths(1.0, 1.0, 1.0))
    assert all(share > 0 for share in found)


def test_attention_is_timed_both_ways_and_torch_left_as_it_was() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for cudnn in (False, True):
        assert bandwidth.attention_us(torch.device("cpu"), range(5, 8), cudnn) > 0
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
