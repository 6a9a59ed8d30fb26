"""Dense matrices in a GGUF type that no kernel takes: the model loads and gives what the plain
model gives.
"""

from __future__ import annotations

import logging
from pathlib import Path

import needs
import pytest
import tiny
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.hosts.transformers import load_plain_model

needs.kt_kernel()


@torch.no_grad()
def test_they_are_requantised_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kind(name: str) -> str:
        if name in ("token_embd.weight", "output.weight") or (
            "attn_" in name and "norm" not in name
        ):
            return "TQ1_0"
        return "F32"

    path = tiny.write(
        tmp_path, "qwen3_moe", changes={"hidden_size": 256, "head_dim": 64}, types=kind
    )
    with caplog.at_level(logging.WARNING):
        model = load_model(None, path, progress=False, accelerator="none")[0]
    assert (
        "layers.0.self_attn.q_proj.weight: no kernel for TQ1_0; requantised to Q8_0" in caplog.text
    )
    assert (
        "embed_tokens.weight: no kernel" in caplog.text
        and "lm_head.weight: no kernel" in caplog.text
    )
    ids = tiny.tokens(6)
    expected = load_plain_model(None, path, dtype="float32", progress=False)[0](ids).logits
    error = float((model(ids).logits - expected).norm() / expected.norm())
    assert (
        error < 0.05
    )  # ternary values fit into 8 bits; activations are rounded to these: 0.4 to 2 % a product
    model.hybrimoe.close()
