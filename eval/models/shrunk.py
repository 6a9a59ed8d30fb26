"""A tiny random model of any mixture-of-experts type that transformers has.

The sizes shrink, every switch stays as the type's default config has it, so that what a family
does differently is still done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of routed experts."""
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
_SIZES: Mapping[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    # Latent attention, and the index of sparse attention.
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 4,
    # Linear attention and state spaces.
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "mamba_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    # Layers that are all dense, and those that predict further tokens.
    "expert_ffn_hidden_size": 64,
    "ffn_hidden_size": 128,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 0,
}
_LATENT: Mapping[str, Any] = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "deepseek_v2": {**_LATENT, "first_k_dense_replace": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 32},
    "dots1": {
        **_LATENT,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "inkling2_text": {"unpadded_vocab_size": 96, "n_routed_experts": 8},
    "inkling2_loop_text": {"unpadded_vocab_size": 96, "n_routed_experts": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
    },
}
"""What a type needs beside smaller sizes, as its default config leaves it out or counts layers."""
_NOT_VALUES = ("architectures", "dtype", "model_type", "transformers_version")


def moe_types() -> list[str]:
    """Model types of transformers' causal language models whose config counts routed experts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(filter(_counts_experts, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def shrunk_config(model_type: str, **changes: Any) -> Any:
    """The text config of a type in small: 8 experts, 2 of them for each token."""
    text = _text_config(model_type)
    values = text.to_dict()
    for name in _NOT_VALUES:
        values.pop(name, None)
    values |= {name: size for name, size in _SIZES.items() if _is_count(values.get(name))}
    values |= {name: 8 for name in EXPERTS if _is_count(values.get(name))}
    values |= {name: min(2, values[name]) for name in _CHOSEN if _is_count(values.get(name))}
    if _is_count(values.get("num_key_value_heads")):
        values["num_key_value_heads"] = 4 if _is_count(values.get("kv_lora_rank")) else 2
    values["num_hidden_layers"] = 4
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(values.get(name), list):
            values[name] = _some_of_each(values[name])
    values |= {**_EXCEPTIONS.get(text.model_type, {}), **changes}
    return type(text)(**values)


def shrunk_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 model of that config, with random weights of a size that makes tokens differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = shrunk_config(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Gains stay near 1, and biases and sinks must not be 0 to be seen.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _counts_experts(model_type: str) -> bool:
    try:
        values = _text_config(model_type).to_dict()
    except Exception:  # no model by itself: its config says what is missing in kinds of errors
        return False
    nested = [value for value in values.values() if isinstance(value, dict)]
    return any(name in found for found in (values, *nested) for name in EXPERTS)


def _text_config(model_type: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type).get_text_config()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _some_of_each(kinds: list[str]) -> list[str]:
    """Four layers in which every kind comes as often as the others."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * 4)[:4]
