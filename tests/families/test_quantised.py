"""Quantised matrices of every family, one module at a time: a near tie in a router must neither
hide an error nor fake one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from loading import injected, plain

IDS = tiny.tokens(12)
LIMIT = 0.03
"""Of activations that are rounded to 8 bits."""


def experts_quantised(name: str) -> str:
    """The type of a tensor, by its name."""
    return "Q8_0" if "_exps" in name else "F32"


def all_quantised(name: str) -> str:
    """The same; the 48 columns of one matrix are no whole number of blocks."""
    return "F32" if "attn_q_b" in name else "Q8_0"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative RMS error."""
    error = (found - wanted).norm()
    return float(error / wanted.norm())


def first_call(module: Any, run: Callable[[], Any]) -> tuple[Any, Any, Any]:
    """Arguments, keyword arguments and result of a module's first call while `run` runs."""
    seen: list[tuple[Any, Any, Any]] = []

    def note(_module: Any, args: Any, kwargs: Any, result: Any) -> None:
        seen.append((args, kwargs, result))

    hook = module.register_forward_hook(note, with_kwargs=True)
    run()
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kt_kernel_is_within_its_activation_error(family: str, tmp_path: Path) -> None:
    needs.kt_kernel()
    path = tiny.write(tmp_path, family, types=experts_quantised)
    right = plain(path)
    model = injected(path, cpu_backend="kt")
    experts = right.model.layers[1].mlp.experts
    args, _, wanted = first_call(experts, lambda: right(IDS))
    found = model.model.layers[1].mlp.experts(*args)
    assert relative(found, wanted) < 0.02
    model.hybrimoe.close()


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_matrices_as_stored_are_within_their_activation_error(family: str, tmp_path: Path) -> None:
    """Dense matrices in Q8_0."""
    needs.kt_kernel()
    path = tiny.write(tmp_path, family, types=all_quantised)
    right = plain(path)
    model = injected(path, dense="quantised")
    attention = right.model.layers[1].self_attn
    args, kwargs, wanted = first_call(attention, lambda: right(IDS, use_cache=False))
    found = model.model.layers[1].self_attn(*args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, right.config.hidden_size, generator=generator)
    assert relative(found[0], wanted[0]) < LIMIT
    head, right_head = model.lm_head(hidden), right.lm_head(hidden)
    assert relative(head, right_head) < LIMIT
    table, right_table = model.get_input_embeddings(), right.get_input_embeddings()
    assert relative(table(IDS), right_table(IDS)) < LIMIT
    model.hybrimoe.close()
