"""The routed experts of one layer, in whatever kind of files a model's weights are."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.weights.checkpoint.experts import CheckpointExperts
from hybrimoe_plugin.weights.checkpoint.source import CheckpointSource
from hybrimoe_plugin.weights.expert_form import ExpertForm
from hybrimoe_plugin.weights.gguf_names import GGUFNames
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import LayerWeights, chosen_experts, layer_weights
from hybrimoe_plugin.weights.parameter_source import ParameterSource
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore

AnySource = ParameterSource | CheckpointSource


def source_of(store: GGUFStore, config: Any, names: GGUFNames) -> AnySource:
    """The parameters of a model in a store.

    Args:
        names: how GGUF files of the model's family deviate from the usual names.

    Raises:
        WeightsError: as `ParameterSource`.
    """
    if isinstance(store, SafetensorsStore):
        return CheckpointSource(store, config)
    return ParameterSource(store, config, names)


def find_experts(
    store: GGUFStore, config: Any, key: str, layer: int, form: ExpertForm
) -> LayerWeights:
    """One layer's experts.

    Args:
        key: the experts module's qualified name.
        layer: its decoder layer.

    Raises:
        WeightsError: a tensor is missing or has another shape.
        ConfigError: the config does not state the experts of a token.
    """
    top_k = chosen_experts(config)
    if isinstance(store, SafetensorsStore):
        return CheckpointExperts(CheckpointSource(store, config), key, form).layer(layer, top_k)
    return layer_weights(
        store,
        layer,
        experts=form.experts,
        hidden=form.hidden,
        intermediate=form.intermediate,
        top_k=top_k,
        activation=form.activation,
        has_biases=form.has_biases,
    )
