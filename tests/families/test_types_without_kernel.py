"""A matrix of any GGML type: the model loads, with an accelerator and without, and says what the
plain model says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import stored_types
import tiny
import torch
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType

from eval.models.shrunk import shrunk_model
from hybrimoe_plugin import load_model
from hybrimoe_plugin.compute.cpu.requantise import Requantised, readable_types
from hybrimoe_plugin.engine.cpu_choice import ON_GGML, pool_of
from hybrimoe_plugin.errors import BudgetError, WeightsError
from hybrimoe_plugin.hosts.transformers import gguf_export, load_plain_model, stored
from hybrimoe_plugin.hosts.transformers.preparation import predict
from hybrimoe_plugin.hosts.transformers.preparation.prepare import open_weights, prepare
from hybrimoe_plugin.operators import device_linear
from hybrimoe_plugin.operators.device_linear import DeviceLinear, stays_stored
from hybrimoe_plugin.weights.gguf_store import GGUFStore

needs.kt_kernel()

CHANGES = {"hidden_size": 256, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 4}
"""Rows of whole blocks; and all experts of every token, so that no near tie in a router decides."""
PARTS = ("experts", "attention", "embedding", "head")
PLACES: dict[str, dict[str, Any]] = {
    "cpu": {"accelerator": "none"},
    "slots": {"accelerator": "emulated", "cache_ratio": 0.25, "scheduler": "static"},
    "device": {
        "rules": "gpu/Qwen3-MoE-quantised-dense",
        "dtype": "float32",
        "accelerator": "emulated",
        "cache_ratio": 0.25,
        "scheduler": "static",
    },
}
"""On the CPU alone, with experts on both sides of a link, and with dense matrices beyond it too."""
FLOATS = {"F32": 1e-4, "F16": 0.001, "BF16": 0.008}
ROUNDED = {"experts": 0.02, "attention": 0.03, "embedding": 0.012, "head": 0.012}
"""Relative RMS errors of logits. Kernels round activations to 8 bits, 0.5 % a product, and what is
requantised has its weights rounded to 8 bits too, 0.4 to 0.9 %.
"""
COVERED = 4
"""One of so many cells is checked in every run, the others where slow tests are."""


def limit(kind: str, part: str) -> float:
    if part == "embedding" and (kind == "MXFP4" or kind in readable_types()):
        return 1e-4  # rows are only looked up; and MXFP4 loses nothing as Q5_0
    if part == "experts" and kind == "F16":
        return FLOATS["BF16"]  # kt-kernel, if it is the faster one, takes states in bfloat16
    return FLOATS.get(kind, ROUNDED[part])


def cells() -> Iterator[Any]:
    """(type, part), of which those off the diagonals are slow."""
    for row, kind in enumerate(stored_types.KINDS):
        for column, part in enumerate(PARTS):
            covered = (row + column) % COVERED == 0
            yield pytest.param(kind, part, marks=() if covered else pytest.mark.slow)


def kind_of(name: str, part: str, kind: str) -> str:
    """The type of a tensor where one part of the model has `kind`."""
    is_part = {
        "experts": "_exps" in name,
        "attention": "attn_" in name and "norm" not in name,
        "embedding": name == "token_embd.weight",
        "head": name == "output.weight",
    }
    return kind if is_part[part] else "F32"


def check_notices(said: str, kind: str, part: str, place: str) -> None:
    """One notice names what takes more memory than the file says, and nothing is said else."""
    on_cpu = place != "device" or part == "experts"
    dequantised = place == "device" and part in ("attention", "head") and kind not in FLOATS
    assert said.count("no CPU kernel for") == (on_cpu and kind not in readable_types()), place
    assert said.count("no device kernel for") == (dequantised and not stays_stored(kind)), place


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize(("kind", "part"), list(cells()))
def test_every_type(
    kind: str,
    part: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = stored_types.write(
        tmp_path, "qwen3_moe", lambda name: kind_of(name, part, kind), CHANGES
    )
    # The interpreter takes seconds for what the kernels' own tests show.
    monkeypatch.setattr(DeviceLinear, "_has_kernel", lambda self: False)
    ids = tiny.tokens(6)
    wanted = load_plain_model(None, path, dtype="float32", progress=False)[0](ids).logits
    for place, settings in PLACES.items():
        caplog.clear()
        model, _ = load_model(None, path, progress=False, **settings)
        error = relative(model(ids).logits, wanted)
        counters = model.hybrimoe.stats()
        model.hybrimoe.close()
        exact = place == "device" and part != "experts"
        assert error < (1e-4 if exact else limit(kind, part)), place
        if place != "cpu":
            assert counters.experts_cpu and counters.experts_accelerator
        check_notices(caplog.text, kind, part, place)


@torch.no_grad()
def test_copies_that_do_not_fit_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has both numbers, the tensors and what to do; and that helps."""
    path = stored_types.write(
        tmp_path, "qwen3_moe", lambda name: kind_of(name, "experts", "TQ2_0"), CHANGES
    )
    monkeypatch.setattr(predict, "free_host_bytes", lambda: 1 << 20)
    monkeypatch.setattr(stored, "free_host_bytes", lambda: 1 << 20)
    numbers = r"need 1\.\d MiB of memory, 1\.0 MiB are free"
    with pytest.raises(BudgetError, match=numbers) as refused:
        load_model(None, path, progress=False, accelerator="none")
    said = str(refused.value)
    assert "no CPU kernel for TQ2_0 (6 tensors, such as ffn_gate_exps of layer 0)" in said
    assert "requantised to Q8_0, which takes 1.6 MiB" in said and "cpu_backend='torch'" in said
    way_out: dict[str, Any] = {"cpu_backend": "torch", "dense": "quantised"}
    model, _ = load_model(None, path, progress=False, accelerator="none", **way_out)
    right, _ = load_plain_model(None, path, dtype="float32", progress=False)
    ids = tiny.tokens(6)
    assert relative(model(ids).logits, right(ids).logits) < 1e-4
    model.hybrimoe.close()


def test_the_prediction_counts_what_a_device_dequantises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head, in a type without a kernel there; attention stays as stored."""
    monkeypatch.setattr(device_linear, "stays_stored", lambda kind: kind != "TQ2_0")
    path = stored_types.write(
        tmp_path,
        "qwen3_moe",
        lambda name: {"output.weight": "TQ2_0"}.get(name, "Q8_0"),
        CHANGES,
    )
    store = open_weights(None, path)
    rules = PLACES["device"]["rules"]
    prepared = prepare(None, store, rules, dtype="bfloat16", settings={"accelerator": "emulated"})
    injection = prepared.inject()
    prediction = predict.predict(prepared, injection.devices)
    (head,) = prediction.requantised
    assert head == Requantised(
        "TQ2_0", "bfloat16", ("output.weight",), 96 * 66, 96 * 256 * 2, on_device=True
    )
    sizes = {part.what: part.nbytes for part in prediction.parts}
    linears = [item for item in stored.stored_matrices(prepared.model) if item.on_device]
    attention = sum(
        store.info(name).nbytes for name in store.tensors if "attn_" in name and "norm" not in name
    )
    assert len(linears) == 2 * 4 + 1
    assert sizes[predict.STORED] == attention
    assert sizes[predict.DEQUANTISED] >= head.nbytes


@torch.no_grad()
@pytest.mark.skipif(
    "MXFP4" not in stored_types.KINDS or "gpt-oss" not in MODEL_ARCH_NAMES.values(),
    reason="an older gguf package",
)
@pytest.mark.parametrize("place", ["cpu", "slots"])
def test_experts_with_biases_in_mxfp4_have_kernels_too(place: str, tmp_path: Path) -> None:
    """kt-kernel refuses their activation, ggml their type: they are requantised for ggml."""
    path = tmp_path / "model.gguf"
    model = shrunk_model("gpt_oss", num_local_experts=4, num_experts_per_tok=4)
    gguf_export.export_gguf(model, path, types=lambda name: kind_of(name, "experts", "MXFP4"))
    right, _ = load_plain_model(None, path, dtype="float32", progress=False)
    ids = tiny.tokens(6) % right.config.vocab_size
    model, _ = load_model(None, path, progress=False, **PLACES[place])
    assert pool_of(model.hybrimoe.engines[0]).name in ON_GGML
    assert relative(model(ids).logits, right(ids).logits) < ROUNDED["experts"]
    model.hybrimoe.close()


@pytest.mark.parametrize(
    ("part", "name"), [("experts", "ffn_gate_exps of layer 0"), ("head", "output.weight")]
)
def test_what_nothing_can_read_is_refused_by_name(
    part: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q8_K is a type of activations; gguf does not dequantise it."""

    def zeros(values: Any, kind: GGMLQuantizationType) -> Any:
        if kind.name != "Q8_K":
            return stored_types.stored(values, kind)
        return np.zeros((*values.shape[:-1], values.shape[-1] // 256 * 292), np.uint8)

    monkeypatch.setattr(gguf_export, "quantize", zeros)
    path = tiny.write(
        tmp_path, "qwen3_moe", changes=CHANGES, types=lambda tensor: kind_of(tensor, part, "Q8_K")
    )
    monkeypatch.setattr(GGUFStore, "read_into_memory", None)
    with pytest.raises(WeightsError, match=rf"model.gguf: {name}: GGML type Q8_K cannot be"):
        load_model(None, path, progress=False, accelerator="none")
