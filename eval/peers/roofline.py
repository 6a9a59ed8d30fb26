"""What a token must read, and how fast this machine reads: the bound that decoding is judged by."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrimoe_plugin.weights.gguf_store import GGUFStore


def token_bytes(gguf: Path, config: Any) -> int:
    """Stored bytes that one token's forward pass reads.

    These are all dense matrices, K of the E routed experts, and the head.
    """
    from hybrimoe_plugin.weights.layer_weights import expert_counts

    store = GGUFStore.open(gguf)
    experts, _ = expert_counts(config)
    total = 0.0
    for name, info in store.tensors.items():
        if "_exps." in name:
            total += info.nbytes * config.num_experts_per_tok / experts
        elif name != "token_embd.weight":
            total += info.nbytes
    if "output.weight" not in store.tensors:  # a tied head reads the embedding
        total += store.info("token_embd.weight").nbytes
    return round(total)


def read_gbps(threads: int, size: int = 1 << 29, repeats: int = 7) -> float:
    """Measured read bandwidth of main memory.

    It is the best of several sums over 512 MiB, which no usual cache holds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.from_numpy(np.ones(size // 8, dtype=np.int64))
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            values.sum()
            times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return size / min(times) / 1e9
