"""GGUF files that state more than their model needs, or state it in llama.cpp's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_plugin.families.registry import family_of
from hybrimoe_plugin.hosts.transformers import gguf_export


def architecture_of(model: Any) -> str:
    """The GGUF architecture under which a model is written."""
    return family_of(model.config.model_type).architectures[0]


def export(
    model: Any,
    path: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A GGUF with these keys of its architecture and these tensors besides the model's own."""
    architecture, plain = architecture_of(model), gguf_export.tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf_export,
            "tensors",
            lambda *args, **kwargs: {**plain(*args, **kwargs), **(tensors or {})},
        )
        extra = {f"{architecture}.{key}": value for key, value in (keys or {}).items()}
        gguf_export.export_gguf(model, path, extra=extra)
    return path


def factors(model: Any) -> dict[str, torch.Tensor]:
    """What llama.cpp's converter stores for Llama 3's rotary embedding; nothing for others."""
    parameters, angles = model.config.rope_parameters, model.model.rotary_emb.inv_freq
    if parameters["rope_type"] != "llama3":
        return {}
    plain = parameters["rope_theta"] ** -(torch.arange(len(angles)) / len(angles))
    return {"rope_freqs.weight": plain / angles}
