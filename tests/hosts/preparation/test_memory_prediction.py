"""What `hybrimoe explain` predicts is what loading takes, and what it is refused by."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import BackendError, BudgetError
from hybrimoe_plugin.hosts.transformers.preparation import predict as module
from hybrimoe_plugin.hosts.transformers.preparation.experts_memory import EXPERTS
from hybrimoe_plugin.hosts.transformers.preparation.predict import DEQUANTISED, LEFT, predict
from hybrimoe_plugin.hosts.transformers.preparation.prediction import (
    DISK,
    EMULATED,
    MAPPED,
    MEMORY,
    PINNED,
    Prediction,
)
from hybrimoe_plugin.hosts.transformers.preparation.prepare import plan_for
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

PROFILE = "laptop-8gb"
"""Nothing is measured here."""

MARGIN = 0.02
SMALL = 64 * 1024
"""Rotary frequencies and the like are not counted."""

ONE_LAYER = """
- match:
    name: "^model\\\\.layers\\\\.1\\\\.mlp\\\\.experts$"
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
  recursive: False
"""

TWO_GPUS = """
- match:
    name: "^model\\\\.layers\\\\.\\\\d+$"
  replace:
    class: hybrimoe_plugin.decode.graphed_layer.GraphedLayer
""" + "".join(
    ONE_LAYER.replace("layers\\\\.1", f"layers\\\\.{layer}")
    .rstrip()
    .replace("  recursive", f"    kwargs: {{generate_device: 'cuda:{layer}'}}\n  recursive")
    for layer in range(2)
)


@pytest.fixture
def partial_rules(tmp_path: Path) -> Path:
    path = tmp_path / "partial.yaml"
    path.write_text(ONE_LAYER)
    return path


def written(folder: Path, family: str = "mixtral") -> Path:
    path = folder / "model.gguf"
    tiny.write_quantised(path, family)
    return path


def predicted(path: Path, rules: Path | None = None, **settings: Any) -> Prediction:
    prepared = plan_for(None, path, rules, **settings)
    injection = prepared.inject()
    return predict(prepared, injection.devices)


def matrices() -> list[QuantizedMatrix]:
    return [found for found in gc.get_objects() if type(found) is QuantizedMatrix]


def allocated(model: Any, store: GGUFStore, others: list[QuantizedMatrix]) -> int:
    """Bytes of a loaded model in main memory, without those of the mapped file.

    Args:
        others: matrices of other models.
    """
    held = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    for engine in model.hybrimoe.engines:
        if engine.accelerator is not None:
            storage = engine.accelerator._buffer.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    spans = [(part.ctypes.data, part.ctypes.data + part.size) for part in store._bytes]
    known = set(map(id, others))
    for found in matrices():
        start = found.data.ctypes.data
        inside = any(first <= start < last for first, last in spans)
        if id(found) not in known and not inside:
            held[start] = found.data.nbytes
    if not store._mapped:  # read into memory
        held[-1] = store.nbytes
    return sum(held.values())


SETTINGS: list[dict[str, Any]] = [
    {"weights": "mapped", "dense": "quantised"},
    {"weights": "memory"},
    {"weights": "mapped", "dense": "plain"},
    {"weights": "mapped", "accelerator": "emulated", "cache_ratio": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_the_prediction_is_what_is_allocated(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    if settings.get("dense") == "quantised":
        needs.kt_kernel()
    path = written(tmp_path, family)
    settings = {"cpu_backend": "torch", "profile": PROFILE, **settings}
    others = matrices()
    prediction = predicted(path, **settings)
    model, _ = load_model(None, path, progress=False, **settings)
    operators = [part for part in model.modules() if hasattr(part, "find_weights")]
    found = allocated(model, operators[0].store, others)
    model.hybrimoe.close()
    expected = prediction.total(MEMORY, EMULATED, later=False)
    assert found == pytest.approx(expected, rel=MARGIN, abs=SMALL)
    assert prediction.unreplaced is None


def test_experts_without_a_rule_are_told_once(
    tmp_path: Path, partial_rules: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path)
    prediction = predicted(path, partial_rules)
    (left,) = [part for part in prediction.parts if part.what == LEFT]
    assert left.place == MEMORY
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(None, path, partial_rules, progress=False, profile=PROFILE)
    weights = list(model.model.layers[0].mlp.experts.parameters())
    assert left.nbytes == sum(value.numel() * value.element_size() for value in weights)
    model.hybrimoe.close()
    (warning,) = [line for line in caplog.messages if line.startswith("memory: ")]
    assert "no rule replaces model.layers.0.mlp.experts: these experts are dequantised" in warning
    replaced = [layer.replaced for layer in prediction.layers]
    assert replaced == [False, True]


def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    tmp_path: Path, partial_rules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    needed = predicted(path, partial_rules).total(MEMORY, later=False)

    def read(*_: object) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr(module, "free_host_bytes", lambda: needed - 1)
    monkeypatch.setattr(GGUFStore, "dequantized", read)
    with pytest.raises(BudgetError, match=r"do not fit into memory: .*no rule replaces model"):
        load_model(None, path, partial_rules, progress=False)


def test_what_memory_has_no_room_for_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    roomy = predicted(path, weights="mapped", context=0)
    free = roomy.total(MEMORY) + roomy.total(MAPPED) - 1000
    monkeypatch.setattr(module, "free_host_bytes", lambda: free)
    tight = predicted(path, weights="mapped", context=0)
    assert tight.total(DISK) == 1000
    assert tight.total(MAPPED) == roomy.total(MAPPED) - 1000
    tight.check()
    assert "are read from disk whenever they are used" in tight.warnings()[0]


def test_a_long_context_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    short = predicted(path, weights="mapped", context=0)
    # Twice two heads of 16 values for each of two layers, in float32.
    long = predicted(path, weights="mapped", context=200)
    assert long.total(MEMORY) - short.total(MEMORY) == 200 * 2 * 2 * 16 * 2 * 4
    monkeypatch.setattr(module, "free_host_bytes", lambda: short.total(MEMORY) + 1)
    tight = predicted(path, weights="mapped", context=200)
    tight.check()
    assert "the KV cache of 200 tokens" in tight.warnings()[0]


def test_gpus_that_are_not_there_hold_what_they_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = written(tmp_path)
    rules = tmp_path / "two.yaml"
    rules.write_text(TWO_GPUS)
    prediction = predicted(path, rules)
    on_cpu = predicted(path, weights="mapped", dense="plain")
    experts = [part.nbytes for part in on_cpu.parts if part.what == EXPERTS]
    # Once in main memory, which holds nothing else.
    assert prediction.needed_on_host() == prediction.total(PINNED) == sum(experts)
    gpus = {"cuda:0", "cuda:1"}
    for what in (DEQUANTISED, "KV cache of 256 tokens"):
        assert {part.place for part in prediction.parts if part.what == what} == gpus
    assert prediction.missing.keys() == gpus
    assert sum(prediction.outside.values()) > 0
    in_memory = predicted(path, rules, weights="memory")
    assert in_memory.needed_on_host() == GGUFStore.open(path).nbytes
    monkeypatch.setattr(GGUFStore, "dequantized", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(BackendError, match="accelerator cuda on cuda:0: "):
        load_model(None, path, rules, progress=False)
    # Without an accelerator the same rules run on the CPU.
    alone = predicted(path, rules, accelerator="none")
    assert not gpus & {part.place for part in alone.parts}
    alone.check()
