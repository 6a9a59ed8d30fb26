"""Dense weights are dequantised a part at a time, where they will be, to the same bits as in one go
by `gguf`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from eval.models import tiny
from eval.models.synthetic import random_blocks
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.hosts.transformers import load
from hybrimoe_plugin.hosts.transformers.preparation import places as module
from hybrimoe_plugin.weights import dequant, gguf_store
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.parameter_source import ParameterSource

SHAPE = (3, 5, 512)


def _write(path: Path, kind: str) -> GGUFStore:
    rng = np.random.default_rng(0)
    type_ = GGMLQuantizationType[kind]
    if kind in ("Q4_K", "Q6_K"):  # gguf only reads them
        data = random_blocks(rng, SHAPE, kind).reshape(*SHAPE[:-1], -1)
    else:
        data = quantize(rng.standard_normal(SHAPE).astype(np.float32), type_)
    writer = GGUFWriter(str(path), "llama")
    writer.add_tensor("t", data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFStore.open(path)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K", "TQ1_0"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_a_time", [1 << 20, 256 * 7])
def test_parts_have_the_bits_of_the_whole(
    kind: str, dtype: torch.dtype, at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_store, "_VALUES_AT_A_TIME", at_a_time)
    store = _write(tmp_path / "m.gguf", kind)
    threads = torch.get_num_threads()
    info = store.info("t")
    assert kind in dequant.supported()
    rows = store.raw("t").reshape(SHAPE[0] * SHAPE[1], -1)
    wanted = torch.from_numpy(np.array(dequantize(rows, GGMLQuantizationType[kind]), np.float32))
    found = store.dequantized("t", dtype)
    assert found.dtype == dtype
    assert found.shape == info.shape == SHAPE
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), wanted.reshape(SHAPE).to(dtype).view(bits))
    assert torch.get_num_threads() == threads


def test_stored_bytes_go_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device that is asked for, not on the CPU first; the meta device stands for it."""
    seen = []

    def spy(stored: torch.Tensor, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        seen.append(stored.device.type)
        return torch.empty(shape, device=stored.device)

    store = _write(tmp_path / "m.gguf", "Q8_0")
    monkeypatch.setattr(dequant, "dequantize", spy)
    assert store.dequantized("t", torch.bfloat16, "meta").device.type == "meta"
    assert seen == ["meta"]


def test_dense_weights_are_read_onto_the_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the operators compute on one CUDA device, and what does not fit there is a
    typed error.
    """
    path = tiny.write(tmp_path, "mixtral")
    asked = []

    def out_of_memory(
        self: Any, name: str, shape: Any, dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        asked.append(device)
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(ParameterSource, "load", out_of_memory)
    monkeypatch.setattr(load, "dense_device", lambda model: "cuda:0")
    with pytest.raises(BudgetError, match="do not fit on the accelerator"):
        load.load_plain_model(None, path, progress=False)
    assert asked == ["cuda:0"]


@pytest.mark.parametrize(
    ("places", "refusal", "wanted"),
    [
        ([], None, "cpu"),
        (["cpu", "cpu"], None, "cpu"),
        (["cuda:1", "cpu"], None, "cuda:1"),
        (["cuda:0", "cuda:1"], None, "cpu"),
        (["auto"], None, "cuda:0"),
        (["cuda:1"], "no driver", "cpu"),
    ],
)
def test_where_dense_weights_go(
    places: list[str], refusal: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Operator:
        def __init__(self, device: str) -> None:
            self.key = f"layers.{next(numbers)}"
            self.generate_device = device
            self.devices = [device]
            self.settings = Settings(accelerator="none")

    numbers = itertools.count()
    monkeypatch.setattr(module, "cuda_refusal", lambda: refusal)
    monkeypatch.setattr(
        module, "experts_operators", lambda model: [Operator(place) for place in places]
    )
    assert module.dense_device(torch.nn.Module()) == wanted
