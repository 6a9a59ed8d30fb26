"""A pass over several sequences gives each of them what it gets alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from more_families import CHANGES

from eval.models.shrunk import shrunk_model
from hybrimoe_plugin import load_model
from hybrimoe_plugin.hosts.transformers.prefixes.kinds import new_cache
from hybrimoe_plugin.serve.batching.passes import Passes

LENGTHS = (5, 40, 17)
STEPS = 4


def prompts(model: Any) -> list[list[int]]:
    limit = min(model.config.get_text_config().vocab_size, 96)
    return [(tiny.tokens(n, seed=n) % limit)[0].tolist() for n in LENGTHS]


def alone(model: Any, prompt: list[int]) -> list[torch.Tensor]:
    """Logits [V] behind a prompt, and behind each of the likeliest tokens after it."""
    passes = Passes(model)
    cache = new_cache(model)
    found = [passes.piece(prompt, cache)]
    for _ in range(STEPS):
        found.append(passes.piece([int(found[-1].argmax())], cache))
    return found


def check_together(model: Any) -> None:
    passes = Passes(model)
    assert passes.most_rows > 1
    wanted = [alone(model, prompt) for prompt in prompts(model)]
    caches = [new_cache(model) for _ in LENGTHS]
    found = [
        [passes.piece(prompt, cache)] for prompt, cache in zip(prompts(model), caches, strict=True)
    ]
    for step in range(STEPS):
        rows = [0, 1, 2] if step != 2 else [2, 0]  # one is left out, and comes back
        logits = passes.step(
            [int(found[row][-1].argmax()) for row in rows], [caches[row] for row in rows], rows
        )
        for row, one in zip(rows, logits, strict=True):
            found[row].append(one)
    passes.settle()
    found[1].append(passes.piece([int(found[1][-1].argmax())], caches[1]))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.DENSE])
def test_plain_model(family: str) -> None:
    check_together(tiny.model(family))


@pytest.mark.parametrize("family", CHANGES)
def test_plain_model_of_more_families(family: str) -> None:
    check_together(shrunk_model(family, **CHANGES[family]))


@pytest.mark.parametrize("accelerator", ["none", "emulated"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_injected_model(family: str, accelerator: str, tmp_path: Path) -> None:
    settings = {"accelerator": accelerator, "cpu_backend": "torch"}
    if accelerator != "none":
        settings["cache_ratio"] = 0.5
    path = tiny.write(tmp_path, family)
    model, _ = load_model(None, path, dtype="float32", progress=False, **settings)
    check_together(model)
    model.hybrimoe.close()
