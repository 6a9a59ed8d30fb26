"""Calls of a few rows on the CPU alone: the plain forward's logits, by every backend."""

from __future__ import annotations

import itertools
from pathlib import Path

import few_rows
import needs
import pytest
import tiny
import torch
from loading import injected, plain

needs.kt_kernel()

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2")
RUN: dict[str, few_rows.Run] = {"batch": few_rows.conversations, "tree": few_rows.trees}
LIMIT = 0.03
"""Relative RMS error of the worst row: kernels round activations to 8 bits."""


@pytest.mark.parametrize("backend", ["torch", "ggml"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_plain_forwards(family: str, backend: str, tmp_path: Path) -> None:
    path = tiny.write(tmp_path, family)
    right = tiny.model(family)
    close = {"rtol": 1e-4, "atol": 1e-4} if backend == "ggml" else {}
    model = injected(path, accelerator="none", cpu_backend=backend)
    for run, rows in itertools.product(RUN.values(), few_rows.ROWS):
        seed, wanted = few_rows.decided(right, run, rows)
        few_rows.check_same(run(model, rows, seed), wanted, **close)
    model.hybrimoe.close()


@pytest.mark.parametrize("accelerator", ["none", "emulated"])
@pytest.mark.parametrize("backend", ["ggml", "kt"])
@torch.no_grad()
def test_quantised_experts_give_each_row_what_they_give_it_alone(
    backend: str, accelerator: str, tmp_path: Path
) -> None:
    """Beside an accelerator the scheduler `static` leaves them all misses."""
    changes = {"num_experts": 32, "num_experts_per_tok": 4}

    def types(name: str) -> str:
        return "Q8_0" if "_exps" in name else "F32"

    path = tiny.write(tmp_path, "qwen3_moe", changes=changes, types=types)
    model = injected(
        path, accelerator=accelerator, cpu_backend=backend, scheduler="static", cache_ratio=0.25
    )
    experts, right = (made.model.layers[1].mlp.experts for made in (model, plain(path)))
    generator = torch.Generator().manual_seed(0)
    for rows in few_rows.ROWS:
        hidden = torch.randn(rows, 64, generator=generator)
        weights, ids = torch.randn(rows, 32, generator=generator).softmax(1).topk(4)
        found, wanted = experts(hidden, ids, weights), right(hidden, ids, weights)
        errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert errors.max() < LIMIT, rows
    model.hybrimoe.close()
