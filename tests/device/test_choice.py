"""One device for a whole model: what its name asks of the engine and of the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.device import machine
from hybrimoe_plugin.device.choice import device_name, placed
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.hosts.transformers.load import experts_operators


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        (None, {}),
        ("cpu", {"accelerator": "none", "prefill_device": "cpu", "generate_device": "cpu"}),
        ("cuda", {"accelerator": "cuda", "prefill_device": "cuda:0", "generate_device": "cuda:0"}),
        (
            "cuda:3",
            {"accelerator": "cuda", "prefill_device": "cuda:3", "generate_device": "cuda:3"},
        ),
        ("emulated", {"accelerator": "emulated"}),
    ],
)
def test_settings_of_a_device(device: str | None, chosen: dict[str, Any]) -> None:
    assert placed({"context": 1}, device) == {"context": 1, **chosen}
    if chosen:
        same = {"accelerator": chosen["accelerator"]}
        assert placed(same, device) == placed({"accelerator": "auto"}, device) == chosen


@pytest.mark.parametrize(
    ("device", "accelerator"),
    [("cpu", "cuda"), ("cpu", "emulated"), ("cuda", "none"), ("cuda:1", "emulated")],
)
def test_contradictions_are_refused(device: str, accelerator: str) -> None:
    with pytest.raises(ConfigError, match=f"device {device} and accelerator {accelerator} contra"):
        placed({"accelerator": accelerator}, device)


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:٣", "cpu\n"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected cpu, cuda, cuda:N or emulated"):
        device_name(name)


def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cuda_refusal", lambda: "torch sees no CUDA device")
    with pytest.raises(BackendError, match="device cuda:1: torch sees no CUDA device; use"):
        machine.cuda_device("cuda:1")
    monkeypatch.setattr(machine, "cuda_refusal", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.cuda_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BackendError, match="device cuda:9999: there are 2 CUDA devices"):
        machine.cuda_device("cuda:9999")


def test_a_model_is_placed_by_the_device(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, "mixtral")
    options = {"dtype": "float32", "cpu_backend": "torch", "progress": False}
    model, _ = load_model(gguf_path=path, **placed(options, "cpu"))
    assert {experts.generate_device for experts in experts_operators(model)} == {"cpu"}
    assert all(engine.accelerator is None for engine in model.hybrimoe.engines)
    model, _ = load_model(gguf_path=path, **placed({**options, "cache_ratio": 0.5}, "emulated"))
    assert model.hybrimoe.emulated


def test_a_model_is_placed_on_a_device_that_is_not_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tiny.write(tmp_path, "mixtral")
    with pytest.raises(BackendError, match="accelerator cuda on cuda:1: "):
        load_model(gguf_path=path, progress=False, **placed({}, "cuda:1"))
