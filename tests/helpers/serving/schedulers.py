"""What tests of the scheduler begin with."""

from __future__ import annotations

from typing import Any

import tiny

OPTIONS: dict[str, Any] = {
    "batch": 4,
    "queue": 100,
    "kv_bytes": 1 << 30,
    "prefix_bytes": 1 << 26,
    "piece": 16,
}


def small_model(end: int | None = None) -> Any:
    """A model of 256 positions.

    Args:
        end: the token that ends its texts; None for none.
    """
    made = tiny.model("mixtral", max_position_embeddings=256)
    made.generation_config.eos_token_id = end
    return made


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids, the same for the same seed."""
    return tuple(tiny.tokens(length, seed=seed)[0].tolist())
