"""GGUF files in real models' shapes with random quantised weights, for measuring speed.

What these models say means nothing. Every matrix has the size, the type and the place that it has
in a released file of the model; a slice has fewer layers, or fewer routed experts in each of all
layers, which leaves the work of a token as it is. Values are random with the spread that keeps
activations in range; the router is random, so routing is flat.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from hybrimoe_plugin.cache_folder import cache_dir
from hybrimoe_plugin.errors import ConfigError

VERSION = 1
QUANTISATIONS = ("Q4_K_M", "Q8_0", "Q4_0")
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What llama.cpp's quantiser takes for rows that 256 does not divide."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # Shapes as in the models' published config.json.
    "deepseek-v2-lite": (
        "deepseek_v2",
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "vocab_size": 102400,
        },
    ),
    "qwen2-57b-a14b": (
        "qwen2_moe",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "vocab_size": 151936,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151936,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "vocab_size": 32000,
        },
    ),
}


def config(model: str, layers: int, experts: int | None = None) -> Any:
    """The transformers config of a model's first layers, with some of its routed experts.

    Args:
        layers: how many.
        experts: routed ones in each layer.

    Raises:
        ConfigError: unknown model, no layer with routed experts, or fewer experts than a token
            takes.
    """
    if model not in SHAPES:
        raise ConfigError(f"model: expected one of {', '.join(SHAPES)}, found {model!r}")
    from transformers import AutoConfig

    model_type, values = SHAPES[model]
    if layers <= values.get("first_k_dense_replace", 0):
        raise ConfigError(
            f"layers: expected more than {values.get('first_k_dense_replace', 0)}, found {layers}"
        )
    count = next(
        name for name in ("n_routed_experts", "num_experts", "num_local_experts") if name in values
    )
    if experts is not None:
        if not values["num_experts_per_tok"] <= experts <= values[count]:
            raise ConfigError(
                f"experts: expected {values['num_experts_per_tok']} to {values[count]}, found "
                f"{experts}"
            )
        values = {**values, count: experts}
    return AutoConfig.for_model(
        model_type,
        **values,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def build(
    model: str, layers: int, quantisation: str = "Q4_K_M", experts: int | None = None
) -> Path:
    """The slice's GGUF, from the cache directory or written there first.

    Raises:
        ConfigError: unknown model or quantisation.
    """
    if quantisation not in QUANTISATIONS:
        raise ConfigError(
            f"quantisation: expected one of {', '.join(QUANTISATIONS)}, found {quantisation!r}"
        )
    made = config(model, layers, experts)
    part = "" if experts is None else f"-{experts}-experts"
    path = (
        cache_dir() / "synthetic" / f"{model}-{layers}-layers{part}-{quantisation}-v{VERSION}.gguf"
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            write(
                Path(name),
                made,
                lambda tensor, shape: choose_type(tensor, shape, quantisation, layers),
            )
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return path


def write(path: Path, made: Any, choose: Callable[[str, tuple[int, ...]], str]) -> None:
    """Write a model of the config's shape.

    Args:
        choose: gives the GGML type of a tensor by its GGUF name and shape.
    """
    from hybrimoe_plugin.families.gguf_metadata import metadata
    from hybrimoe_plugin.families.registry import family_of
    from hybrimoe_plugin.hosts.transformers.gguf_export import add_value, finish, tensors
    from hybrimoe_plugin.hosts.transformers.skeleton import meta_model

    family = family_of(made.model_type)
    architecture = family.architectures[0]
    rng = np.random.default_rng(0)
    writer = GGUFWriter(str(path), architecture)
    keys = {**metadata(made, family), **_latent_metadata(made, architecture)}
    for key, value in keys.items():
        add_value(writer, key, value)
    writer.add_tokenizer_model("none")
    shown = tensors(meta_model(made), family, split_kv_b=_is_latent(made))
    for name, value in shown.items():
        shape = tuple(value.shape)
        kind = "F32" if len(shape) == 1 or "ffn_gate_inp" in name else choose(name, shape)
        if kind == "F32":
            writer.add_tensor(name, _floats(rng, name, shape))
        else:
            data = random_blocks(rng, shape, kind)
            writer.add_tensor(
                name, data.reshape(*shape[:-1], -1), raw_dtype=GGMLQuantizationType[kind]
            )
    finish(writer)


def choose_type(name: str, shape: tuple[int, ...], quantisation: str, layers: int) -> str:
    """The type of a matrix in a released file.

    That is llama.cpp's mix for Q4_K_M, and one type for the others.
    """
    if quantisation != "Q4_K_M":
        return quantisation
    kind = "Q4_K"
    if name == "output.weight":
        kind = "Q6_K"
    elif "attn_v.weight" in name or "ffn_down" in name:
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            kind = "Q6_K"
    return kind if shape[-1] % 256 == 0 else _FALLBACK[kind]


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> NDArray[np.uint8]:
    """Random bytes [n] of a GGML type; values have a spread of 1 / sqrt(row length)."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    count = int(np.prod(shape)) // block
    raw = (
        np.frombuffer(rng.bytes(count * block_bytes), dtype=np.uint8)
        .reshape(count, block_bytes)
        .copy()
    )
    spread = shape[-1] ** -0.5

    def put(at: int, value: float) -> None:
        raw[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)

    if kind == "Q4_K":  # d * 32 * q - dmin * 32, q of 0 to 15
        raw[:, 4:16] = np.frombuffer(bytes([32] * 8 + [0] * 4), dtype=np.uint8)
        raw[:, 4:12] |= 0x80  # the upper two bits of scales and minima 4 to 7
        put(0, spread / (32 * 4.6))
        put(2, 7.5 * spread / (32 * 4.6))
    elif kind == "Q6_K":
        raw[:, 192:208] = 32
        put(208, spread / (32 * 18.5))
    else:
        steps = {"Q8_0": 73.9, "Q4_0": 4.6, "Q5_0": 9.2}
        put(0, spread / steps[kind])
    return raw.reshape(-1)


def _floats(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if len(shape) == 1:
        zero = name.endswith(".bias")
        return np.zeros(shape, np.float32) if zero else np.ones(shape, np.float32)
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)


def _is_latent(made: Any) -> bool:
    return hasattr(made, "kv_lora_rank")


def _latent_metadata(made: Any, architecture: str) -> dict[str, Any]:
    """How current files describe latent attention.

    There is one key head, as wide as a latent and its rotary part.
    """
    if not _is_latent(made):
        return {}
    keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": made.kv_lora_rank + made.qk_rope_head_dim,
        "attention.value_length": made.kv_lora_rank,
        "attention.key_length_mla": made.qk_nope_head_dim + made.qk_rope_head_dim,
        "attention.value_length_mla": made.v_head_dim,
    }
    return {f"{architecture}.{key}": value for key, value in keys.items()}
