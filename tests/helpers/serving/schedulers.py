"""What tests of the scheduler begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from hybrimoe_plugin import load_model

OPTIONS: dict[str, Any] = {
    "batch": 4,
    "queue": 100,
    "kv_bytes": 1 << 30,
    "prefix_bytes": 1 << 26,
    "piece": 16,
}


POSITIONS = 256
"""Of the models here."""


def small_model(end: int | None = None) -> Any:
    """A plain model.

    Args:
        end: the token that ends its texts; None for none.
    """
    made = tiny.model("mixtral", max_position_embeddings=POSITIONS)
    made.generation_config.eos_token_id = end
    return made


def injected(folder: Path, family: str = "mixtral", **settings: Any) -> Any:
    """A model of `POSITIONS` positions with this project's operators, without an end of its texts.

    The plain one's twin for the default family.

    Args:
        folder: where its file goes.
        settings: of the engine; on the CPU alone by default.
    """
    path = tiny.write(folder, family, changes={"max_position_embeddings": POSITIONS})
    exact = {"accelerator": "none", "cpu_backend": "torch", "dtype": "float32", **settings}
    made, _ = load_model(None, path, progress=False, **exact)
    made.generation_config.eos_token_id = None
    return made


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids, the same for the same seed."""
    return tuple(tiny.tokens(length, seed=seed)[0].tolist())
