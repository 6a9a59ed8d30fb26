"""Pieces of several prompts and next tokens of answers in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from schedulers import injected

from hybrimoe_plugin.hosts.transformers.prefixes.kinds import new_cache
from hybrimoe_plugin.serve.batching.passes import Part, Passes


def ids(model: Any, count: int, seed: int) -> list[int]:
    limit = min(model.config.get_text_config().vocab_size, 96)
    return (tiny.tokens(count, seed=seed) % limit)[0].tolist()


def check_parts(model: Any) -> None:
    """Each sequence gets in crowded passes what it gets alone."""
    passes = Passes(model)
    texts = [ids(model, count, seed) for seed, count in enumerate((9, 70, 40))]
    # Each pass: which sequence gets how many tokens. Answers go on beside prompts that begin, that
    # go on and that end, and some sequences are left out.
    crowds = [
        {0: 8, 1: 30},
        {1: 20, 0: 1, 2: 5},
        {2: 34, 1: 20},
        {0: 1},
        {1: 1, 2: 1, 0: 1},
    ]
    given = [0, 0, 0]
    caches = [new_cache(model) for _ in texts]
    apart = [new_cache(model) for _ in texts]
    for crowd in crowds:
        parts = []
        wanted = []
        for row, count in crowd.items():
            tokens = (texts[row] * 2)[given[row] : given[row] + count]
            given[row] += count
            parts.append(Part(tokens, caches[row]))
            wanted.append(Passes(model).piece(tokens, apart[row]))
        found = passes.parts(parts)
        torch.testing.assert_close(found, torch.stack(wanted), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("accelerator", ["none", "emulated"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_together(family: str, accelerator: str, tmp_path: Path) -> None:
    settings = {} if accelerator == "none" else {"cache_ratio": 0.5}
    model = injected(tmp_path, family, accelerator=accelerator, **settings)
    try:
        assert Passes(model).takes_parts
        check_parts(model)
    finally:
        model.hybrimoe.close()


def test_a_plain_model_takes_no_parts() -> None:
    passes = Passes(tiny.model("mixtral"))
    assert passes.takes_pieces and not passes.takes_parts
