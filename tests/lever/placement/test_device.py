"""Accelerators by name, and host buffers that are registered with them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_plugin.compute.gpu import host_bytes
from hybrimoe_plugin.device import machine
from hybrimoe_plugin.device.streams import HostStreams
from hybrimoe_plugin.errors import BackendError, ConfigError
from lever_ext import target as targets
from lever_ext.placement import device as devices
from lever_ext.placement.device import TargetDevice, make_device
from lever_ext.placement.pinned import PinnedBuffers
from lever_ext.target import FlashTarget, load_target
from tests.lever.helpers import prompt
from tests.lever.placement.helpers import COPIED, CPU, GREEDY, STAYS, budget_for


class FakeRuntime:
    """The CUDA runtime's registrations."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.ranges: dict[int, int] = {}

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:  # noqa: N802
        assert start % 4096 == size % 4096 == 0 and flags == 1 and start not in self.ranges
        if not self.refuse:
            self.ranges[start] = size
        return int(self.refuse)

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        del self.ranges[start]
        return 0


@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_buffers_are_pinned_while_a_cuda_device_computes(
    family: str,
    refuse: bool,
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = FakeRuntime(refuse)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host_bytes, "_clear_error", lambda device: None)
    made = TargetDevice(
        torch.device("cpu"), HostStreams(), 1 << 30, PinnedBuffers(torch.device("cpu"))
    )
    monkeypatch.setattr(targets, "make_device", lambda *_: made)
    places = (STAYS, CPU, COPIED, COPIED)
    with caplog.at_level(logging.WARNING):
        target: FlashTarget = load_target(
            packs[family],
            dram_budget=budget_for(packs[family], places, 0.3),
            device="cuda",
            places=places,
        )
    buffers = [
        *target.stream.inner.buffers,
        *(target.experts.buffers if target.experts is not None else ()),
    ]
    assert buffers and ("cannot be registered" in caplog.text) == refuse
    assert runtime.ranges == (
        {} if refuse else {b.bytes.data_ptr(): b.bytes.numel() for b in buffers}
    )
    want = plain_models[family].generate(prompt(0), **GREEDY)
    assert torch.equal(target.model.generate(prompt(0), **GREEDY), want)
    target.close()
    assert not runtime.ranges


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_device("cpu") is None
    for name in ("gpu", "cuda:", "cuda:x", "tpu:0"):
        with pytest.raises(ConfigError, match="cpu, cuda, cuda:N or emulated"):
            make_device(name)
    with pytest.raises(ConfigError, match="vram_budget"):
        make_device("emulated")
    monkeypatch.setattr(machine, "cuda_refusal", lambda: "torch sees no CUDA device")
    with pytest.raises(BackendError, match=r"no CUDA device; use --device cpu"):
        make_device("cuda")
    monkeypatch.setattr(machine, "cuda_refusal", lambda: None)
    monkeypatch.setattr(devices, "CudaStreams", lambda device: HostStreams())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    made = make_device("cuda:1")
    assert (
        made is not None
        and made.free_bytes == 900
        and made.pins is not None
        and made.label == "cuda:1"
    )
    limited = make_device("cuda", "500B")
    assert (
        limited is not None
        and limited.free_bytes == 500
        and limited.device == torch.device("cuda:0")
    )
    with pytest.raises(BackendError, match="there are 2"):
        make_device("cuda:2")
