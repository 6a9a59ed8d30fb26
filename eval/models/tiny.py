"""Tiny random models of every family, as transformers models and as GGUF files.

For tests, and for checks on a device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
}


class Tiny(NamedTuple):
    """One tiny model."""

    name: str
    model_type: str
    values: dict[str, Any]
    """Of its config, beside `_BASE`."""


_MOE = (
    Tiny(
        "mixtral",
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    Tiny(
        "qwen2_moe",
        "qwen2_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 128,
            "norm_topk_prob": False,
        },
    ),
    Tiny(
        "qwen2_moe_norm",
        "qwen2_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "norm_topk_prob": True,
        },
    ),
    Tiny(
        "qwen3_moe",
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
    ),
    Tiny(
        "deepseek_v2",
        "deepseek_v2",
        {
            **_MLA,
            "q_lora_rank": 48,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
        },
    ),
    Tiny(
        "deepseek_v2_lite",
        "deepseek_v2",
        {
            **_MLA,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_shared_experts": 2,
        },
    ),
    Tiny(
        "deepseek_v3",
        "deepseek_v3",
        {
            **_MLA,
            "q_lora_rank": 48,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
)
_DENSE = (
    Tiny("llama", "llama", {}),
    Tiny("qwen2", "qwen2", {}),
    Tiny("qwen3", "qwen3", {"head_dim": 32}),
)

FAMILIES = {tiny.name: tiny for tiny in _MOE}
DENSE = {tiny.name: tiny for tiny in _DENSE}


def config(family: str, **changes: Any) -> Any:
    """The config of a tiny model of this family."""
    from transformers import AutoConfig

    tiny = {**FAMILIES, **DENSE}[family]
    values = {
        **_BASE,
        **tiny.values,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **changes,
    }
    return AutoConfig.for_model(tiny.model_type, **values)


def model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 model with distinct random weights everywhere; routers prefer clearly."""
    from transformers import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*built.named_parameters(), *built.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight") or "layernorm" in name:
                value.copy_(1 + 0.1 * noise)
            elif "correction_bias" in name:
                value.copy_(0.1 * noise)
            elif ".gate.weight" in name:
                value.copy_(noise * 0.5)
            else:
                value.copy_(noise * value.shape[-1] ** -0.5)
    built.tie_weights()
    return built


def write(
    folder: Path, family: str, seed: int = 0, changes: dict[str, Any] | None = None, **export: Any
) -> Path:
    """Write a tiny model as `model.gguf`; keyword arguments go to `export_gguf`."""
    path = folder / "model.gguf"
    export_gguf(model(family, seed, **(changes or {})), path, **export)
    return path


def write_quantised(path: Path, family: str) -> None:
    """Write a tiny model whose experts and larger dense matrices are Q8_0.

    Every backend takes that type.
    """
    wide = ("exps", "shexp", "attn_q.", "attn_k.", "attn_v.", "attn_output")
    export_gguf(
        model(family),
        path,
        types=lambda name: "Q8_0" if any(part in name for part in wide) else "F32",
    )


def tokens(count: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Token ids [batch, count], the same for the same seed."""
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))
