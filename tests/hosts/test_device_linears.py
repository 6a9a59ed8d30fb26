"""A whole model with its dense matrices kept quantised for a device gives the logits of the dequantised one."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.hosts.transformers import load_plain_model
from hybrimoe_plugin.operators.device_linear import DeviceLinear


def test_quantised_dense_matrices_on_a_device(tmp_path: Path) -> None:
    path = tiny.write(
        tmp_path, "qwen3_moe", types=lambda name: "Q8_0" if "attn_" in name and "norm" not in name else "F32"
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
    assert len(linears) == 4 * 2 + 1
    assert {module.type_name for module in linears} == {"Q8_0", "F32"}
    ids = tiny.tokens(11)
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            torch.testing.assert_close(model(part).logits, plain(part).logits)
    model.hybrimoe.close()
