"""Loading a GGUF in float32, plain and with operators, and comparing what models say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from steps import step

from hybrimoe_plugin import load_model, load_plain_model
from hybrimoe_plugin.compute.attention.kv_cache import cache_in


def plain(path: Path, directory: Path | None = None) -> Any:
    """The plain transformers model of a file, with the config of a directory if one is given."""
    model, _ = load_plain_model(directory, path, dtype="float32", progress=False)
    return model


def injected(path: Path, directory: Path | None = None, **settings: Any) -> Any:
    """The same with operators, whose experts compute in torch unless settings say otherwise."""
    settings = {"cpu_backend": "torch", **settings}
    model, _ = load_model(directory, path, dtype="float32", progress=False, **settings)
    return model


@torch.no_grad()
def logits(model: Any, prompt: torch.Tensor, steps: torch.Tensor | None = None) -> torch.Tensor:
    """Of a prefill, and of single-token decode steps behind it.

    Args:
        prompt: ids [B, T].
        steps: ids [B, steps], or None for the prefill alone.
    """
    out = model(prompt, use_cache=True)
    found = [out.logits]
    columns = () if steps is None else steps.T
    for ids in columns:
        out = step(model, ids[:, None], cache_in(out))
        found.append(out.logits)
    return torch.cat(found, dim=1)


def check_same(model: Any, right: Any, prompt: torch.Tensor, steps: Any = None) -> None:
    """The logits of a prompt and of decode steps are the same."""
    found = logits(model, prompt, steps)
    wanted = logits(right, prompt, steps)
    torch.testing.assert_close(found, wanted)


def check_applied(path: Path, right: Any, other: Any, **settings: Any) -> None:
    """A file's model says what `right` says, and `other`, which lacks the feature, does not.

    The model is plain without settings, and has operators with them.
    """
    prompt = tiny.tokens(80)
    steps = tiny.tokens(2, seed=1)
    wanted = logits(right, prompt, steps)
    without = logits(other, prompt, steps)
    assert (without - wanted).abs().max() > 1e-2
    model = injected(path, **settings) if settings else plain(path)
    found = logits(model, prompt, steps)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if settings:
        model.hybrimoe.close()
