"""Models that commands inspect without loading them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_plugin.errors import WeightsError

if TYPE_CHECKING:
    from hybrimoe_plugin.weights.gguf_store import GGUFStore
    from hybrimoe_plugin.weights.layer_weights import LayerWeights

EXPERT_TENSOR = re.compile(r"^blk\.(\d+)\.ffn_(?:gate|up|down)(?:_exps|\.\d+)\.weight$")
"""Names of GGUF tensors of routed experts: stacked, or one per expert in older files."""


def open_model(model_path: str | None, gguf_path: str) -> tuple[GGUFStore, Any]:
    """The mapped weights and the model's config.

    Raises:
        WeightsError: raised by the store and the config reader.
    """
    from hybrimoe_plugin.hosts.transformers.config import model_config
    from hybrimoe_plugin.hosts.transformers.preparation.prepare import open_weights

    store = open_weights(model_path, gguf_path)
    return store, model_config(model_path, store)


def first_experts(store: GGUFStore, config: Any) -> LayerWeights:
    """The experts of the model's first MoE layer, which the engine would measure.

    Raises:
        WeightsError: the file holds no experts, or not those of the config.
    """
    from hybrimoe_plugin.weights.layer_weights import expert_counts, layer_weights

    names = map(EXPERT_TENSOR.match, store.tensors)
    layers = [int(found[1]) for found in names if found is not None]
    if not layers:
        raise WeightsError(
            f"{store.paths[0]}: no routed experts in this file: it is a dense model, for which "
            "llama.cpp suits better"
        )
    experts, intermediate = expert_counts(config)
    return layer_weights(
        store,
        min(layers),
        experts=experts,
        hidden=config.hidden_size,
        intermediate=intermediate,
        top_k=config.num_experts_per_tok,
    )


def demo_gguf(form: str, rebuild: bool = False) -> Path:
    """The demo model's file, built if needed."""
    from hybrimoe_plugin.demo import build_demo_model

    return Path(build_demo_model(form, rebuild=rebuild))
