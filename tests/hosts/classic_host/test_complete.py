"""What kTransformers would not read from a GGUF file is refused before it loads one; no host is
needed to see it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from stated import export

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.ktransformers.adapter import Shared


def opened(path: Path) -> Shared:
    """As the first operator of a model opens the loader's files."""
    return Shared.of(SimpleNamespace(file_data_map={str(path): None}))


@pytest.mark.parametrize(
    ("family", "keys", "tensors"),
    [
        ("mixtral", {}, ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.attn_sinks.weight")),
        (
            "mixtral",
            {"logit_scale": 0.5, "attention.sliding_window": 8},
            ("rope_factors_long.weight",),
        ),
        (
            "qwen2_moe",
            {"attn_logit_softcapping": 30.0},
            ("blk.0.attn_output.bias", "blk.0.attn_q_norm.weight"),
        ),
        ("deepseek_v3", {"attention.indexer.top_k": 8}, ("blk.0.attn_q_a.bias",)),
    ],
)
def test_what_the_host_would_not_read_is_named(
    family: str, keys: Any, tensors: Any, tmp_path: Path
) -> None:
    path = export(
        tiny.model(family), tmp_path / "m.gguf", keys, dict.fromkeys(tensors, torch.full((8,), 0.5))
    )
    with pytest.raises(WeightsError) as error:
        opened(path)
    assert [name for name in (*keys, *tensors) if name not in str(error.value)] == []


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3"]
)
def test_files_of_its_families_are_accepted(family: str, tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": torch.ones(8)}
    assert opened(
        export(tiny.model(family), tmp_path / "m.gguf", {"logit_scale": 1.0}, ones)
    ).store.tensors


def test_experts_in_tensors_of_their_own_are_accepted(tmp_path: Path) -> None:
    assert opened(tiny.write(tmp_path, "mixtral", stacked=False)).store.tensors
