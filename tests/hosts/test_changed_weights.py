"""Weights files that change while a model uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import WeightsError


def write(folder: Path) -> Path:
    path = folder / "model.gguf"
    tiny.write_quantised(path, "mixtral")
    return path


@torch.no_grad()
def test_a_changed_file_ends_the_next_answer_not_the_process(tmp_path: Path) -> None:
    path = write(tmp_path)
    model = load_model(None, path, progress=False, accelerator="none", weights="mapped")[0]
    ids = tiny.tokens(4)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    path.write_bytes(bytes(path.stat().st_size))
    for _ in range(2):
        with pytest.raises(WeightsError, match="model.gguf: .* changed while it is in use"):
            model.generate(ids, max_new_tokens=2, do_sample=False)
    model.hybrimoe.close()


@torch.no_grad()
def test_a_file_that_anybody_may_write_to_is_not_mapped(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.chmod(0o666)
    # In torch: what the CPU computes first may be in a slot the second time, and kernels round.
    settings: Any = {"accelerator": "emulated", "cache_ratio": 0.5, "cpu_backend": "torch"}
    model = load_model(None, path, progress=False, **settings)[0]
    ids = tiny.tokens(4)
    expected = model(ids).logits
    path.write_bytes(bytes(path.stat().st_size))
    torch.testing.assert_close(model(ids).logits, expected)
    model.hybrimoe.close()


def test_a_file_that_anybody_may_write_to_and_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    path.chmod(0o666)
    monkeypatch.setattr("hybrimoe_plugin.hosts.transformers.stored._MOST_OF_FREE", 0.0)
    with pytest.raises(
        WeightsError, match=r"model.gguf: any user may write .*chmod o-w.*weights='mapped'"
    ):
        load_model(None, path, progress=False, accelerator="none")
    load_model(None, path, progress=False, accelerator="none", weights="mapped")[0].hybrimoe.close()
