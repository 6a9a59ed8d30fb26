"""Models that commands inspect without loading them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_plugin.errors import WeightsError

if TYPE_CHECKING:
    from hybrimoe_plugin.weights.gguf_store import GGUFStore
    from hybrimoe_plugin.weights.layer_weights import LayerWeights


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
    from hybrimoe_plugin.hosts.transformers.complete import check_complete
    from hybrimoe_plugin.hosts.transformers.skeleton import meta_model
    from hybrimoe_plugin.operators.expert_form import read_form
    from hybrimoe_plugin.operators.experts import layer_of
    from hybrimoe_plugin.weights.find_experts import find_experts

    model = meta_model(config)
    modules = [item for item in model.named_modules() if item[0].endswith(".experts")]
    if not modules:
        raise WeightsError(
            f"{store.paths[0]}: no routed experts in this file: it is a dense model, for which "
            "llama.cpp suits better"
        )
    if store.directory is not None:
        check_complete(model, store, config)  # which says what the tensors are
    key, module = modules[0]
    return find_experts(store, config, key, layer_of(key), read_form(key, module))


def demo_gguf(form: str, rebuild: bool = False) -> Path:
    """The demo model's file, built if needed."""
    from hybrimoe_plugin.demo import build_demo_model

    return Path(build_demo_model(form, rebuild=rebuild))
