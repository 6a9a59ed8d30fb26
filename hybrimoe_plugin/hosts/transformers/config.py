"""A transformers config from a model directory, or from GGUF metadata, and a check that the two agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.experts.gguf_store import GGUFStore


class Facts:
    """GGUF metadata of one architecture, read with types checked."""

    def __init__(self, store: GGUFStore) -> None:
        self.store = store
        self.architecture = store.architecture
        self.where = str(store.paths[0])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{architecture}.{key}`."""
        return self.store.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise WeightsError(f"{self.where}: {self.architecture}.{key} is {value!r}, not a sensible whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WeightsError(f"{self.where}: {self.architecture}.{key} is {value!r}, not a number")
        return float(value)

    def has(self, key: str) -> bool:
        return self.get(key) is not None


def model_config(model_path: str | Path | None, store: GGUFStore | None) -> Any:
    """The model's config from `model_path/config.json`, else from GGUF metadata.

    Raises:
        WeightsError: neither is there, the architecture is unknown, or the two do not describe the same model.
    """
    from_gguf = config_from_gguf(store) if store is not None else None
    if model_path is not None and (Path(model_path) / "config.json").exists():
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(model_path))
        except Exception as error:  # transformers raises many kinds
            raise WeightsError(f"{model_path}/config.json: transformers cannot read it ({error})") from error
        if from_gguf is not None:
            check_same_model(config, from_gguf, str(model_path), str(store.paths[0]) if store else "")
        return config
    if model_path is not None and not Path(model_path).exists():
        raise WeightsError(f"{model_path}: no such model directory")
    if from_gguf is None:
        raise WeightsError(f"{model_path}: no config.json there, and no GGUF file was given")
    return from_gguf


def config_from_gguf(store: GGUFStore) -> Any:
    """Build the config that the GGUF metadata describes.

    Raises:
        WeightsError: an architecture without support, or metadata missing or out of range.
    """
    facts = Facts(store)
    builder = _BUILDERS.get(facts.architecture)
    if builder is None:
        raise WeightsError(
            f"{facts.where}: GGUF architecture {facts.architecture!r} is not supported; "
            f"supported are {', '.join(sorted(_BUILDERS))}"
        )
    model_type, values = builder(facts)
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # strict dataclass validation raises kinds of its own
        raise WeightsError(f"{facts.where}: its metadata does not make a {model_type} config ({error})") from error


def check_same_model(config: Any, from_gguf: Any, directory: str, file: str) -> None:
    """Compare what must agree between a directory's config and the weights.

    Raises:
        WeightsError: naming both values.
    """
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "num_experts_per_tok",
        "moe_intermediate_size",
    )
    pairs = [(name, getattr(config, name, None), getattr(from_gguf, name, None)) for name in names]
    pairs.append(("number of experts", _experts(config), _experts(from_gguf)))
    for name, ours, theirs in pairs:
        # A Mistral or DeepSeek-like model may come under another type of the same architecture.
        if name == "model_type" and {ours, theirs} <= {"llama", "mistral"}:
            continue
        if name == "vocab_size" and ours is not None and theirs is not None and abs(ours - theirs) < 512:
            continue  # GGUF files drop padding rows of the embedding
        if ours is not None and theirs is not None and ours != theirs:
            raise WeightsError(f"{directory} does not match {file}: {name} is {ours} there and {theirs} in the GGUF")


def _experts(config: Any) -> int | None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _common(facts: Facts) -> dict[str, Any]:
    heads = facts.integer("attention.head_count")
    hidden = facts.integer("embedding_length")
    vocab = facts.store.tensors.get("token_embd.weight")
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": facts.integer("block_count") - facts.integer("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.integer("attention.head_count_kv", heads),
        "vocab_size": vocab.shape[0] if vocab is not None else facts.integer("vocab_size"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": facts.integer("context_length", 4096),
        "tie_word_embeddings": "output.weight" not in facts.store.tensors,
        "rope_parameters": _rope(facts),
    }
    if facts.has("attention.key_length"):
        values["head_dim"] = facts.integer("attention.key_length")
    elif heads:
        values["head_dim"] = hidden // heads
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = facts.store.metadata.get(f"tokenizer.ggml.{key}_token_id")
        values[name] = token if isinstance(token, int) else None
    return values


def _rope(facts: Facts) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.number("rope.freq_base", 10000.0)}
    kind = facts.get("rope.scaling.type")
    if kind == "linear":
        rope.update(rope_type="linear", factor=facts.number("rope.scaling.factor"))
    elif kind == "yarn":
        # llama.cpp stores 0.1 * mscale_all_dim as the log multiplier.
        scale = facts.number("rope.scaling.yarn_log_multiplier", 0.1) / 0.1
        rope.update(
            rope_type="yarn",
            factor=facts.number("rope.scaling.factor"),
            original_max_position_embeddings=facts.integer("rope.scaling.original_context_length"),
            beta_fast=32,
            beta_slow=1,
        )
        if facts.architecture == "deepseek2":
            rope.update(mscale=scale, mscale_all_dim=scale)
    return rope


def _llama(facts: Facts) -> tuple[str, dict[str, Any]]:
    values = {**_common(facts), "intermediate_size": facts.integer("feed_forward_length")}
    if facts.integer("expert_count", 0) == 0:
        return "llama", values
    values.update(
        num_local_experts=facts.integer("expert_count"),
        num_experts_per_tok=facts.integer("expert_used_count"),
        sliding_window=None,
    )
    return "mixtral", values


def _qwen(model_type: str) -> Callable[[Facts], tuple[str, dict[str, Any]]]:
    def build(facts: Facts) -> tuple[str, dict[str, Any]]:
        return model_type, {**_common(facts), "intermediate_size": facts.integer("feed_forward_length")}

    return build


def _qwen_moe(model_type: str) -> Callable[[Facts], tuple[str, dict[str, Any]]]:
    def build(facts: Facts) -> tuple[str, dict[str, Any]]:
        # Only the expert size is stored by some converters; it is then the dense size too.
        expert = facts.integer("expert_feed_forward_length", facts.integer("feed_forward_length", 0))
        values = {
            **_common(facts),
            "intermediate_size": facts.integer("feed_forward_length", expert),
            "moe_intermediate_size": expert,
            "num_experts": facts.integer("expert_count"),
            "num_experts_per_tok": facts.integer("expert_used_count"),
            "norm_topk_prob": bool(facts.get("expert_weights_norm", model_type == "qwen3_moe")),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if model_type == "qwen2_moe":
            shared = facts.store.tensors.get("blk.0.ffn_gate_shexp.weight")
            size = shared.shape[0] if shared is not None else expert
            values["shared_expert_intermediate_size"] = facts.integer("expert_shared_feed_forward_length", size)
        return model_type, values

    return build


def _deepseek(facts: Facts) -> tuple[str, dict[str, Any]]:
    values = _common(facts)
    values.pop("head_dim")
    rope = facts.integer("rope.dimension_count")
    key = facts.integer("attention.key_length_mla", facts.integer("attention.key_length"))
    values.update(
        # Files with split kv_b describe multi-query attention; the model itself has one key head per query head.
        num_key_value_heads=values["num_attention_heads"],
        intermediate_size=facts.integer("feed_forward_length"),
        moe_intermediate_size=facts.integer("expert_feed_forward_length"),
        n_routed_experts=facts.integer("expert_count"),
        num_experts_per_tok=facts.integer("expert_used_count"),
        n_shared_experts=facts.integer("expert_shared_count"),
        routed_scaling_factor=facts.number("expert_weights_scale", 1.0),
        norm_topk_prob=bool(facts.get("expert_weights_norm", False)),
        first_k_dense_replace=facts.integer("leading_dense_block_count", 0),
        q_lora_rank=facts.integer("attention.q_lora_rank") if facts.has("attention.q_lora_rank") else None,
        kv_lora_rank=facts.integer("attention.kv_lora_rank"),
        qk_rope_head_dim=rope,
        qk_nope_head_dim=key - rope,
        v_head_dim=facts.integer("attention.value_length_mla", facts.integer("attention.value_length")),
    )
    groups = facts.integer("expert_group_count", 1)
    values.update(n_group=groups, topk_group=facts.integer("expert_group_used_count", 1))
    # 2 is a sigmoid, which came with V3; files without the key are older and softmax.
    if facts.integer("expert_gating_func", 1) == 2:
        return "deepseek_v3", values
    values["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    return "deepseek_v2", values


_BUILDERS: Mapping[str, Callable[[Facts], tuple[str, dict[str, Any]]]] = {
    "llama": _llama,
    "qwen2": _qwen("qwen2"),
    "qwen3": _qwen("qwen3"),
    "qwen2moe": _qwen_moe("qwen2_moe"),
    "qwen3moe": _qwen_moe("qwen3_moe"),
    "deepseek2": _deepseek,
}
