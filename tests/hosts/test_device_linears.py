"""A whole model with its dense matrices kept quantised for a device gives the logits of the
dequantised one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from replayed import Replayed

from hybrimoe_plugin import load_model
from hybrimoe_plugin.decode import connect
from hybrimoe_plugin.hosts.transformers import load_plain_model
from hybrimoe_plugin.operators import dense
from hybrimoe_plugin.operators.device_linear import DeviceLinear


def test_quantised_dense_matrices_on_a_device(tmp_path: Path) -> None:
    path = tiny.write(
        tmp_path,
        "qwen3_moe",
        types=lambda name: "Q8_0" if "attn_" in name and "norm" not in name else "F32",
    )
    plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
    model, _ = load_model(
        None,
        path,
        rules="gpu/Qwen3-MoE-quantised-dense",
        dtype="float32",
        cpu_backend="torch",
        accelerator="emulated",
        progress=False,
    )
    linears = [module for module in model.modules() if isinstance(module, DeviceLinear)]
    assert len(linears) == 4 * 2 + 1, "four in each layer and the head"
    assert {module.type_name for module in linears} == {"Q8_0", "F32"}
    ids = tiny.tokens(11)
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            torch.testing.assert_close(model(part).logits, plain(part).logits)
    model.hybrimoe.close()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2_lite", "deepseek_v3"])
def test_every_family_with_graphs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lean operators take their matrices as stored where a device computes, captured or not."""

    def kind(name: str) -> str:
        stored = any(
            part in name
            for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate.", "output")
        )
        return "Q8_0" if stored and "_b" not in name else "F32"

    path = tiny.write(tmp_path, family, types=kind)
    plain, _ = load_plain_model(None, path, dtype="float32", progress=False)
    monkeypatch.setattr(
        dense, "cuda_refusal", lambda: None
    )  # `auto` takes the torch twins of what a GPU would run
    monkeypatch.setattr(
        DeviceLinear, "_has_kernel", lambda self: False
    )  # Triton's interpreter cannot be recorded
    capture = Replayed()
    monkeypatch.setattr(connect, "capture_for", lambda device: capture)
    choices = {
        "dense": "quantised",
        "cpu_backend": "torch",
        "accelerator": "emulated",
        "progress": False,
    }
    model, _ = load_model(None, path, dtype="float32", **choices)
    linears = [module for module in model.modules() if isinstance(module, DeviceLinear)]
    assert len(linears) >= 2 * 3 + 1 and "Q8_0" in {module.type_name for module in linears}
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    prompt = tiny.tokens(5)
    assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))
    assert capture.replayed > 20 * 2
    model.hybrimoe.close()
