"""The tiny models that llama.cpp's converter gets."""

from __future__ import annotations

from typing import Any

from more_families import CHANGES as MORE

CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    # Files cannot say that it is off, as it is by default in transformers and in no released model.
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v2": {},
    "deepseek_v3": {},
    **MORE,
    "gemma4_text": {},
    "phimoe": {
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
            "short_mscale": 1.243163121016122,  # the released model's, which no file states
            "long_mscale": 1.243163121016122,
        },
    },
}
"""By model type: what its tiny model has beside the defaults."""
CONFIGS: dict[str, dict[str, Any]] = {
    # As the released models' config.json says it, and transformers' does not.
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "minimax_m2": {"rotary_dim": 16},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "hunyuan_v1_moe": {
        "moe_topk": [2] * 4,
        "num_shared_expert": [1] * 4,
        "moe_intermediate_size": [128] * 4,
    },
}
"""By model type: what the converter's config.json has beside transformers'."""
