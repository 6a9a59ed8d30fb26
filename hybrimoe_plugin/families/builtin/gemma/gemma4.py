"""Gemma 4 with routed experts beside each layer's MLP, and heads of two sizes."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import Draft, read_common, read_experts
from hybrimoe_plugin.families.rope import FULL, SLIDING
from hybrimoe_plugin.weights.gguf_names import GGUFNames

_ACTIVATION = "gelu_pytorch_tanh"
_PATTERN = "attention.sliding_window_pattern"
_CAP = "final_logit_softcapping"


def _holds(facts: Facts) -> bool:
    return facts.integer("expert_count", 0) > 0


def _describe(facts: Facts, draft: Draft) -> None:
    read_common(facts, draft, groups_by_layer=True)
    read_experts(facts, draft, "num_experts", "top_k_experts")
    draft.take("enable_moe_block", True)
    draft.take("moe_intermediate_size", facts.integer("expert_feed_forward_length", least=1))
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    draft.take("hidden_activation", _ACTIVATION)
    cap = facts.number(_CAP, 0.0, positive=False)
    draft.take(_CAP, cap or None, _CAP)
    # What only models without experts have; keys that state another number of them are refused.
    draft.take("hidden_size_per_layer_input", 0)
    draft.take("num_kv_shared_layers", 0)
    _read_attention(facts, draft)


def _read_attention(facts: Facts, draft: Draft) -> None:
    """Which layers have a sliding window, and the sizes of their heads and of the others'."""
    layers = draft.stated["num_hidden_layers"]
    pattern = facts.get(_PATTERN)
    stated = isinstance(pattern, list) and all(item in (0, 1) for item in pattern)
    if not stated or len(pattern) < layers:
        raise facts.wrong(_PATTERN, f"expected true or false for each of {layers} layers", pattern)
    windows = [bool(item) for item in pattern[:layers]]
    if windows[-1]:
        raise facts.wrong(_PATTERN, "the last layer must have full attention", pattern)
    draft.take("layer_types", [SLIDING if window else FULL for window in windows])
    draft.take("sliding_window", facts.integer("attention.sliding_window", least=1))
    full = facts.integer("attention.key_length", least=1)
    sliding = facts.integer("attention.key_length_swa", full, least=1)
    for size, end in ((full, ""), (sliding, "_swa")):
        why = f"keys have {size} dimensions, all of which values and rotary embedding must have"
        facts.only(f"attention.value_length{end}", size, why)
        facts.only(f"rope.dimension_count{end}", size, why)
    draft.by_layer["head_dim"] = [sliding if window else full for window in windows]
    draft.rope_width = full
    draft.sliding_rope_width = sliding
    held = [f"blk.{layer}.attn_v.weight" in facts.store.tensors for layer in range(layers)]
    draft.assumed["attention_k_eq_v"] = not all(held)


def _metadata(config: Any) -> dict[str, Any]:
    values = {
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        _PATTERN: [kind == SLIDING for kind in config.layer_types],
    }
    if config.final_logit_softcapping is not None:
        values[_CAP] = float(config.final_logit_softcapping)
    for kind, end in ((FULL, ""), (SLIDING, "_swa")):
        size = config.per_layer_config[kind].head_dim
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            values[f"{key}{end}"] = size
    return values


GEMMA4 = Family(
    model_type="gemma4_text",
    architectures=("gemma4",),
    describe=_describe,
    holds=_holds,
    neutral={"embedding_length_per_layer_input": (0,), "attention.shared_kv_layers": (0,)},
    activation=_ACTIVATION,
    activation_name="hidden_activation",
    names=GGUFNames(
        tensors={
            ".layer_scalar": "blk.{layer}.layer_output_scale.weight",
            ".router.scale": "blk.{layer}.ffn_gate_inp.scale",
            ".router.per_expert_scale": "blk.{layer}.ffn_down_exps.scale",
        },
        fused_experts=True,
    ),
    metadata=_metadata,
)
