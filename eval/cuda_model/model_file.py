"""Model files with random weights in the shapes of real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.models import synthetic
from eval.models.routing import Routing
from eval.models.shapes import Model, layer_bytes
from hybrimoe_plugin.device.memory import free_host_bytes

FILE_BYTES = 4e9
"""Bytes of the experts in a model's file: a few layers suffice to tell what one costs."""
MOST_LAYERS = 12
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 256,
}
"""Shape of a dry run; layers, experts and top-k stay."""


def write(
    model: Model, given: Routing, layers: int, path: Path, dry: bool, vocabulary: int | None = None
) -> None:
    """Write a file of the model's shape whose tokens take as many experts as the routing's.

    Args:
        layers: number of MoE layers.
        vocabulary: rows of embedding and head instead of the model's own; a dry run has few anyway.
    """
    dense = synthetic.SHAPES[model.shape][1].get("first_k_dense_replace", 0)
    config = synthetic.config(model.shape, layers + dense)
    config.num_experts_per_tok = given.header.top_k
    if hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = model.intermediate
    if vocabulary is not None:
        config.vocab_size = vocabulary
    if dry:
        _shrink(config)

    def choose(name: str, shape: tuple[int, ...]) -> str:
        if not dry:
            return synthetic.choose_type(name, shape, "Q4_K_M", config.num_hidden_layers)
        return "Q8_0" if shape[-1] % 32 == 0 else "F32"

    synthetic.write(path, config, choose)


def layers_that_fit(model: Model, given: Routing, dry: bool) -> int:
    """Number of MoE layers in a model's file."""
    most = len(given.prompts[0])
    if dry:
        return min(most, 2)
    room = min(FILE_BYTES, 0.5 * free_host_bytes())
    count = int(room / layer_bytes(model, given.header.experts))
    return min(most, max(2, min(MOST_LAYERS, count)))


def _shrink(config: Any) -> None:
    for name, value in SMALL.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
