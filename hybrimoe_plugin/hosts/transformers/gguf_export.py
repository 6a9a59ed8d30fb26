"""Write a transformers model as GGUF: for demo and test models; the inverse of `names` and `config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.names import rotate

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}

ChooseType = Callable[[str], str]
"""GGUF tensor name -> GGML type name."""


def export_gguf(
    model: Any,
    path: str | Path,
    *,
    types: ChooseType | str = "F32",
    stacked: bool = True,
    split_kv_b: bool = False,
    extra: Mapping[str, Any] | None = None,
    shard_tensors: int = 0,
) -> None:
    """Write config metadata and all weights of a model.

    Args:
        types: GGML type of each matrix, by GGUF name or one for all; vectors stay F32. Only what `gguf` can quantise.
        stacked: experts as `ffn_*_exps`; False gives each a tensor of its own, as old files do.
        split_kv_b: store DeepSeek's kv_b as `attn_k_b` and `attn_v_b`.
        extra: further metadata: strings, numbers, booleans and lists of them.
        shard_tensors: tensors per file of a split set; 0 writes one file.
    """
    arch = ARCHITECTURES[model.config.model_type]
    choose = types if callable(types) else lambda _name: str(types)
    writer = GGUFWriter(str(path), arch, split_max_tensors=shard_tensors)
    for key, value in {**metadata(model.config, arch), **(extra or {})}.items():
        _add(writer, key, value)
    for name, value in tensors(model, arch, stacked, split_kv_b).items():
        kind = GGMLQuantizationType["F32" if value.ndim == 1 else choose(name)]
        array = value.detach().float().contiguous().numpy()
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            data = quantize(array, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(config: Any, arch: str) -> dict[str, Any]:
    """GGUF metadata that describes the config, under llama.cpp's keys."""
    rope = config.rope_parameters
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if arch == "deepseek2":
        values.update(_deepseek_metadata(config))
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values.update({f"attention.{part}_length": head_dim for part in ("key", "value")})
        values["rope.dimension_count"] = head_dim
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if isinstance(experts, int) and hasattr(config, "num_experts_per_tok"):
        values.update(expert_count=experts, expert_used_count=config.num_experts_per_tok)
        if arch.startswith("qwen"):
            values["expert_feed_forward_length"] = config.moe_intermediate_size
            values["expert_weights_norm"] = bool(config.norm_topk_prob)
        if arch == "qwen2moe":
            values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return {f"{arch}.{key}": value for key, value in values.items()}


def _deepseek_metadata(config: Any) -> dict[str, Any]:
    values = {
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
    }
    if config.q_lora_rank is not None:
        values["attention.q_lora_rank"] = config.q_lora_rank
    if config.n_group is not None:
        values.update(expert_group_count=config.n_group, expert_group_used_count=config.topk_group)
    return values


def tensors(model: Any, arch: str, stacked: bool = True, split_kv_b: bool = False) -> dict[str, torch.Tensor]:
    """GGUF name -> value in GGUF's layout."""
    from gguf import get_tensor_name_map
    from gguf.constants import MODEL_ARCH_NAMES

    config = model.config
    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    out: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = f"blk.{name.split('.')[2]}" if name.startswith("model.layers.") else ""
        if name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            out.update(_experts(f"{layer}.ffn_gate", gate, stacked) | _experts(f"{layer}.ffn_up", up, stacked))
        elif name.endswith("experts.down_proj"):
            out.update(_experts(f"{layer}.ffn_down", value, stacked))
        elif name.endswith("e_score_correction_bias"):
            out[f"{layer}.exp_probs_b.bias"] = value
        elif split_kv_b and name.endswith("kv_b_proj.weight"):
            heads = value.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, values = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
            out[f"{layer}.attn_k_b.weight"] = keys.transpose(1, 2)
            out[f"{layer}.attn_v_b.weight"] = values
        else:
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise WeightsError(f"parameter {name!r} has no GGUF name in architecture {arch!r}")
            if arch == "llama" and ".q_proj." in name:
                value = rotate(value, config.num_attention_heads)
            if arch == "llama" and ".k_proj." in name:
                value = rotate(value, config.num_key_value_heads)
            out[found] = value
    return out


def _experts(name: str, value: torch.Tensor, stacked: bool) -> dict[str, torch.Tensor]:
    if stacked:
        return {f"{name}_exps.weight": value}
    return {f"{name}.{expert}.weight": matrix for expert, matrix in enumerate(value)}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else list(value))
