"""Write a transformers model as GGUF: for demo and test models; the inverse of `names` and
`config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.rope import FACTORS, frequencies
from hybrimoe_plugin.weights.parameter_source import rotate

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
        types: GGML type of each matrix, by GGUF name or one for all; vectors stay F32. Only what
            `gguf` can quantise.
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
    """GGUF metadata that describes the config, under llama.cpp's keys.

    Raises:
        WeightsError: the config asks for what these files cannot say.
    """
    _refuse_unsayable(config, arch)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **_rope_metadata(config, arch),
    }
    if arch == "deepseek2":
        values.update(_deepseek_metadata(config))
    else:
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
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
    if getattr(config, "sliding_window", None):
        values["attention.sliding_window"] = config.sliding_window
    return {f"{arch}.{key}": value for key, value in values.items()}


def _rope_metadata(config: Any, arch: str) -> dict[str, Any]:
    """Rotary embedding; factors of single frequencies are tensors."""
    rope = config.rope_parameters
    values: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        values.update(
            {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        )
    if rope["rope_type"] == "longrope" and frequencies(rope, _width(config)) is None:
        values.update(
            {
                "rope.scaling.type": "longrope",
                "rope.scaling.attn_factor": _long_scaling(config, rope),
            }
        )
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] != "yarn":
        return values
    values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name) is not None:
            values[f"rope.scaling.yarn_{name}"] = float(rope[name])
    scale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if arch == "deepseek2" and all_dims:
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * all_dims
    # Readers take one `mscale` for both, and of other architectures none.
    usual = not (scale or all_dims) or (arch == "deepseek2" and scale == all_dims)
    if rope.get("attention_factor") is not None or not usual:
        values["rope.scaling.yarn_attn_factor"] = _rotary(config, rope)[1]
    return values


def _width(config: Any) -> int:
    """Dimensions of a head that are turned."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rotary(config: Any, rope: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """Angles and scaling of a rotary embedding that does not depend on the context's length."""
    found = frequencies(rope, _width(config))
    assert found is not None
    return found


def _long_scaling(config: Any, rope: Mapping[str, Any]) -> float:
    """What transformers multiplies cosines and sines by where `longrope` is given no attention
    factor.
    """
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return float(rope.get("attention_factor") or usual)


def _rope_tensors(config: Any) -> dict[str, torch.Tensor]:
    """What frequencies are divided by, where that is not one number for all."""
    rope = config.rope_parameters
    if rope["rope_type"] not in ("llama3", "longrope"):
        return {}
    found = frequencies(rope, _width(config))
    if found is None:
        return {
            f"rope_factors_{part}.weight": torch.tensor(rope[f"{part}_factor"])
            for part in ("long", "short")
        }
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return {FACTORS: _rotary(config, plain)[0] / found[0]}


def _refuse_unsayable(config: Any, arch: str) -> None:
    kind = config.rope_parameters["rope_type"]
    wrong = []
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        wrong.append(f"rope_type {kind!r}")
    if config.hidden_act != "silu":
        wrong.append(f"hidden_act {config.hidden_act!r}")
    if wrong:
        raise WeightsError(f"a GGUF of architecture {arch!r} cannot say {' and '.join(wrong)}")


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


def tensors(
    model: Any, arch: str, stacked: bool = True, split_kv_b: bool = False
) -> dict[str, torch.Tensor]:
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
            out.update(
                _experts(f"{layer}.ffn_gate", gate, stacked)
                | _experts(f"{layer}.ffn_up", up, stacked)
            )
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
    out.update(_rope_tensors(config))
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
