"""A batch's decode step, as `model.generate` makes it: one token of each sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hybrimoe_plugin.injection.own_attributes import give_own
from hybrimoe_plugin.operators.bind import HybriMoE
from hybrimoe_plugin.policy.step import FEW_ROWS, Rows


def follow_batches(model: nn.Module, handle: HybriMoE | None) -> Callable[[], None]:
    """Run passes of one token for each of 2 to 32 sequences as `run_rows` does.

    Each sequence counts as a conversation of its own.

    A pass that `run_rows` itself makes keeps the rows that it was given. Without an accelerator no
    decision depends on rows, and the model is left as it is.

    Args:
        handle: the model's; None where it has no experts operators.

    Returns:
        A function that restores the model's `forward`.

    Mutates: `model`.
    """
    if handle is None or not decides_by_rows(handle):
        return lambda: None
    plain = model.forward

    @functools.wraps(plain)  # transformers reads names of arguments off a model's `forward`
    def forward(*args: Any, **kwargs: Any) -> Any:
        count = _sequences(args, kwargs)
        told = any(engine.rows is not None for engine in handle.engines)
        if told or not 1 < count <= FEW_ROWS:
            return plain(*args, **kwargs)
        rows = Rows(np.arange(count), np.ones(count, bool))
        return handle.run_rows(rows, plain, *args, **kwargs)

    return give_own(model, {"forward": forward})


def decides_by_rows(handle: HybriMoE) -> bool:
    """Whether any decision depends on the rows of a pass: not without an accelerator."""
    return any(engine.accelerator is not None for engine in handle.engines)


def _sequences(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many sequences have one token each in this pass; 0 for any other pass."""
    given = args[0] if args else kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
    if not isinstance(given, torch.Tensor) or given.ndim < 2 or given.shape[1] != 1:
        return 0
    return len(given)
