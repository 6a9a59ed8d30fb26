"""Uses of a transformers model, and pairs of an injected and a plain one to compare them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loading import injected, plain

IDS = tiny.tokens(9)
PAIR = tiny.tokens(9, batch=2)
GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}

SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"accelerator": "emulated", "cache_ratio": 0.5},
    "qwen2_moe": {},
    "qwen3_moe": {"dense": "plain"},
    "deepseek_v2_lite": {"accelerator": "emulated", "cache_ratio": 0.25, "look_ahead": 1},
}
"""Family -> how it is loaded, beside float32 and experts in plain torch: results are the plain
model's then.
"""
_WIDE = ("_exps", "_shexp.", "attn_q.", "attn_k.", "attn_v.", "attn_output.")

Models = dict[str, tuple[Any, Any]]
"""Family -> (injected, plain)."""
Use = Callable[[Any], Any]
"""Something that is done with a model, and what comes of it."""


def injected_and_plain(folders: pytest.TempPathFactory, *families: str) -> Iterator[Models]:
    """For a fixture: the models of these families, by default all, which are closed at the end."""
    made = {}
    for family in families or SETTINGS:
        path = tiny.write(folders.mktemp(family), family)
        made[family] = injected(path, **SETTINGS[family]), plain(path)
    yield made
    for model, _ in made.values():
        model.hybrimoe.close()


def quantised(name: str) -> str:
    """The type of a tensor in a file whose larger matrices are Q8_0."""
    is_wide = name.endswith("weight") and any(part in name for part in _WIDE)
    return "Q8_0" if is_wide else "F32"


def stored_mixtral(folders: pytest.TempPathFactory) -> Path:
    """A file with quantised matrices."""
    return tiny.write(folders.mktemp("stored"), "mixtral", types=quantised)


def outputs(found: Any) -> list[Any]:
    """All that a forward pass gave; tuples with their length, so that one too many shows."""
    values = [found.logits]
    for name in ("loss", "aux_loss"):
        value = getattr(found, name, None)
        values += [] if value is None else [value]
    for name in ("hidden_states", "router_logits"):
        value = getattr(found, name, None)
        values += [] if value is None else [list(value)]
    return values


def called(*args: Any, **kwargs: Any) -> Use:
    """A forward pass without gradients."""

    def use(model: Any) -> Any:
        with torch.no_grad():
            return outputs(model(*args, **kwargs))

    return use


def generated(ids: torch.Tensor = IDS, **options: Any) -> Use:
    """A greedy answer."""
    return lambda model: model.generate(ids, **{**GREEDY, **options})


def every_step(**options: Any) -> Use:
    """Every step of a greedy answer."""

    def use(model: Any) -> Any:
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        found = model.generate(IDS, **{**GREEDY, **wanted, **options})
        hidden = [list(step) for step in found.hidden_states or ()]
        return [found.sequences, list(found.logits), *hidden]

    return use


def in_training(model: Any) -> Any:
    """A forward pass in training mode."""
    model.train()
    try:
        return called(IDS)(model)
    finally:
        model.eval()
