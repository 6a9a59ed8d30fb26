"""The parameters of a model that are still to be read, and those that are another's."""

from __future__ import annotations

from typing import Any

import torch


def missing_parameters(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor of every parameter on the meta device that is read from the file."""
    shared = tied(model, config)
    return {
        name: value
        for name, value in model.state_dict().items()
        if value.is_meta and name not in shared
    }


def tied(model: Any, config: Any) -> set[str]:
    """Parameters that are not read, as they are the embedding's.

    A table that stays as stored is nothing to tie to: a plain head then reads its own copy. And a
    head that stays as stored has no parameter to tie.
    """
    head = model.get_output_embeddings()
    if getattr(head, "stored", None) is not None:
        return set()
    table = getattr(model.get_input_embeddings(), "weight", None)
    if getattr(config, "tie_word_embeddings", False) and isinstance(table, torch.Tensor):
        return {"lm_head.weight"}
    return set()
