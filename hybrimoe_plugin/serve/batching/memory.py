"""How much memory running answers may take for their KV caches."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.engine.sizing import kv_cache_bytes
from hybrimoe_plugin.operators.mla import FusedMLA

SPARE = 256
"""Tokens of room that a growing cache begins with, behind what it holds."""

SHARE = 0.25
"""Of the memory that is free when the server begins."""


class KVMemory:
    """Counts tokens against a limit in bytes.

    A cache doubles its buffers when they are full, so the memory that is really taken may be up to
    twice of what is counted.

    Args:
        model: of transformers; its config says what a token takes.
        limit: bytes; None for a share of the free memory of the device that computes attention.

    Attributes:
        per_token: bytes of one token's entries in all layers.
        limit: bytes.
    """

    def __init__(self, model: Any, limit: int | None) -> None:
        latent = any(isinstance(module, FusedMLA) for module in model.modules())
        config = model.config.get_text_config(decoder=True)
        value_bytes = model.dtype.itemsize
        self.per_token = max(1, kv_cache_bytes(config, 1, latent, value_bytes))
        self.limit = int(SHARE * _free_bytes(model)) if limit is None else limit

    @property
    def tokens(self) -> int:
        """Most tokens of one answer with its prompt."""
        return max(0, self.limit // self.per_token - SPARE)

    def of(self, tokens: int) -> int:
        """Bytes that a sequence of so many tokens takes, with room for the next ones."""
        return self.per_token * (tokens + SPARE)


def _free_bytes(model: Any) -> int:
    if model.device.type == "cuda":
        import torch

        free: int = torch.cuda.mem_get_info(model.device)[0]
        return free
    return free_host_bytes()
