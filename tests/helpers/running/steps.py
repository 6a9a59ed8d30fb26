"""A model's calls with its KV cache, in the words of whichever release of transformers is
installed.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name


def prefill(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """The cache [of B sequences] after a prompt [B, T]."""
    return cache_in(model(ids, use_cache=True, **options))


def step(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> Any:
    """The model's output for ids [B, T] behind what the cache holds. Mutates: the cache."""
    return model(ids, use_cache=True, **{cache_name(model): cache}, **options)
