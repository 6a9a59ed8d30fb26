"""GGUF metadata from a transformers config: the reverse of `description`, to write files."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_rope_written import main_rope, rope_metadata
from hybrimoe_plugin.families.rope import SLIDING

_ROPES = ("default", "linear", "yarn", "llama3", "longrope", "proportional")


def metadata(config: Any, family: Family) -> dict[str, Any]:
    """Metadata that describes the config of a family's model, under llama.cpp's keys.

    Raises:
        WeightsError: the config asks for what these files cannot say.
    """
    architecture = family.architectures[0]
    _refuse_unsayable(config, family)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": _groups(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **rope_metadata(config, family.yarn_mscale),
        **family.metadata(config),
    }
    dense = getattr(config, "intermediate_size", None)
    if dense is not None:
        values["feed_forward_length"] = dense
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING]
    if window and SLIDING in kinds:
        values["attention.sliding_window"] = window
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _groups(config: Any) -> int | list[int]:
    """Key heads: a number, or one for each layer."""
    layers = range(config.num_hidden_layers)
    each = [config.per_layer_config[layer].num_key_value_heads for layer in layers]
    return each if len(set(each)) > 1 else each[0]


def heads_metadata(config: Any) -> dict[str, Any]:
    """Heads of one size, and how many of their dimensions have a rotary embedding."""
    size = getattr(config, "head_dim", None)
    width = size or config.hidden_size // config.num_attention_heads
    part = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return {
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": int(width * part),
    }


def _refuse_unsayable(config: Any, family: Family) -> None:
    kind = main_rope(config)[0]["rope_type"]
    wrong = []
    if kind not in _ROPES:
        wrong.append(f"rope_type {kind!r}")
    activation = getattr(config, family.activation_name)
    if activation != family.activation:
        wrong.append(f"{family.activation_name} {activation!r}")
    for name, usual in family.fixed.items():
        value = getattr(config, name, usual)
        if value != usual:
            wrong.append(f"{name} {value!r}")
    if wrong:
        raise WeightsError(
            f"a GGUF of architecture {family.architectures[0]!r} cannot say {' and '.join(wrong)}"
        )
