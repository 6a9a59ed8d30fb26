"""GGUF files that state more than their model needs, or state it in llama.cpp's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import step

from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.hosts.transformers import gguf_export


def export(
    model: Any,
    path: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A GGUF with these keys of its architecture and these tensors besides the model's own."""
    arch = gguf_export.ARCHITECTURES[model.config.model_type]
    plain = gguf_export.tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf_export,
            "tensors",
            lambda *args, **kwargs: {**plain(*args, **kwargs), **(tensors or {})},
        )
        extra = {f"{arch}.{key}": value for key, value in (keys or {}).items()}
        gguf_export.export_gguf(model, path, extra=extra)
    return path


def factors(model: Any) -> dict[str, torch.Tensor]:
    """What llama.cpp's converter stores for Llama 3's rotary embedding; nothing for others."""
    parameters = model.config.rope_parameters
    angles = model.model.rotary_emb.inv_freq
    if parameters["rope_type"] != "llama3":
        return {}
    plain = parameters["rope_theta"] ** -(torch.arange(len(angles)) / len(angles))
    return {"rope_freqs.weight": plain / angles}


def logits(model: Any, prompt: torch.Tensor, steps: torch.Tensor | None = None) -> torch.Tensor:
    """Of a prefill, and of single-token decode steps behind it."""
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        found = [out.logits]
        for ids in () if steps is None else steps.T:
            out = step(model, ids[:, None], cache_in(out))
            found.append(out.logits)
    return torch.cat(found, dim=1)
