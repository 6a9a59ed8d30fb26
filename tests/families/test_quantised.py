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


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative RMS error."""
    return float((found - wanted).norm() / wanted.norm())


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
    path = tiny.write(tmp_path, family, types=lambda name: "Q8_0" if "_exps" in name else "F32")
    right, model = plain(path), injected(path, cpu_backend="kt")
    args, _, wanted = first_call(right.model.layers[1].mlp.experts, lambda: right(IDS))
    found = model.model.layers[1].mlp.experts(*args)
    assert relative(found, wanted) < 0.02
    model.hybrimoe.close()


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_matrices_as_stored_are_within_their_activation_error(family: str, tmp_path: Path) -> None:
    """Dense matrices in Q8_0."""
    needs.kt_kernel()
    # 48 columns are no whole number of blocks.
    path = tiny.write(tmp_path, family, types=lambda name: "F32" if "attn_q_b" in name else "Q8_0")
    right, model = plain(path), injected(path, dense="quantised")
    attention = right.model.layers[1].self_attn
    args, kwargs, wanted = first_call(attention, lambda: right(IDS, use_cache=False))
    found = model.model.layers[1].self_attn(*args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, right.config.hidden_size, generator=generator)
    assert relative(found[0], wanted[0]) < 0.03
    assert relative(model.lm_head(hidden), right.lm_head(hidden)) < 0.03
    assert relative(model.model.embed_tokens(IDS), right.model.embed_tokens(IDS)) < 0.03
    model.hybrimoe.close()
