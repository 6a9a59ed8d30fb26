"""A transformers config from a model directory, or from GGUF metadata, and a check that the two
agree.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.rope import Rope, difference, read_rope
from hybrimoe_plugin.hosts.transformers.directory import directory_config
from hybrimoe_plugin.weights.gguf_store import GGUFStore

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"^blk\.(\d+)\.")
PADDING_ROWS = 512
"""Tokens by which vocabularies of one tokenizer may differ: some converters drop rows of padding,
others add them.
"""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Description(NamedTuple):
    """What a GGUF file says about its model, under the names of a transformers config."""

    model_type: str
    stated: Mapping[str, Any]
    """What the file states."""
    assumed: Mapping[str, Any]
    """What it leaves open, as llama.cpp understands it; a config.json may say otherwise."""
    rope: Rope
    where: str
    notices: Sequence[str]
    """What was taken for granted and the user should know, if the file is all there is."""


def model_config(model_path: str | Path | None, store: GGUFStore | None) -> Any:
    """The model's config from `model_path/config.json`, else from GGUF metadata.

    Raises:
        WeightsError: neither is there, the architecture is unknown, the metadata is out of range or
            asks for what is not supported, or the two do not describe the same model.
        ConfigError: config.json names code or kernels that would have to be run or fetched.
    """
    if model_path is not None and not Path(model_path).exists():
        raise WeightsError(f"{model_path}: no such model directory")
    described = describe(store) if store is not None else None
    if model_path is not None and (Path(model_path) / "config.json").exists():
        config = directory_config(model_path)
        if described is not None:
            check_same_model(config, described, str(model_path))
            _follow_file(config, described)
        return config
    if described is None:
        raise WeightsError(f"{model_path}: no config.json there, and no GGUF file was given")
    for notice in described.notices:
        log.warning("%s: %s", described.where, notice)
    return _config_of(described)


def describe(store: GGUFStore) -> Description:
    """Read all of the GGUF metadata that concerns the model.

    Raises:
        WeightsError: an architecture without support, metadata missing or out of range, or a key
            that asks for what is not supported.
    """
    facts = Facts(store)
    kind = store.metadata.get("general.type", "model")
    if kind != "model":
        raise WeightsError(
            f"{facts.where}: general.type is {kind!r}, not 'model': it holds no whole model"
        )
    builder = _BUILDERS.get(facts.architecture)
    if builder is None:
        raise WeightsError(
            f"{facts.where}: GGUF architecture {facts.architecture!r} is not supported; "
            f"supported are {', '.join(sorted(_BUILDERS))}"
        )
    draft = _Draft(facts)
    model_type = builder(facts, draft)
    rope = read_rope(facts, draft.rotary)
    facts.check_all_read()
    return Description(model_type, draft.stated, draft.assumed, rope, facts.where, draft.notices)


def check_same_model(config: Any, described: Description, directory: str) -> None:
    """Compare what a directory's config and the GGUF file both state.

    Raises:
        WeightsError: naming both values.
    """
    pairs = [("model_type", config.model_type, described.model_type)]
    pairs += [
        (name, getattr(config, name, None), value) for name, value in described.stated.items()
    ]
    wrong = []
    for name, ours, theirs in pairs:
        if ours is None and name != "sliding_window":
            continue  # the config leaves it open
        if not _agree(name, ours, theirs):
            shown = "number of experts" if name in _EXPERTS else name
            wrong.append(f"{shown} is {ours} there and {theirs} in the GGUF")
    if not wrong and (found := difference(config, described.rope)):
        wrong.append(found)
    if wrong:
        raise WeightsError(f"{directory} does not match {described.where}: {'; '.join(wrong)}")


def _agree(name: str, ours: Any, theirs: Any) -> bool:
    if name == "model_type":  # Mistral is a Llama with a window
        return ours == theirs or {ours, theirs} == {"llama", "mistral"}
    if name == "vocab_size":
        return abs(ours - theirs) < PADDING_ROWS
    if isinstance(ours, float) or isinstance(theirs, float):  # the file has them as float32
        return isinstance(ours, int | float) and math.isclose(ours, theirs, rel_tol=1e-5)
    return bool(ours == theirs)


def _follow_file(config: Any, described: Description) -> None:
    """The weights are those of the file: rows of padding, and a head of its own. Mutates:
    `config`.
    """
    config.vocab_size = described.stated["vocab_size"]
    if not described.assumed["tie_word_embeddings"]:
        config.tie_word_embeddings = False


def _config_of(described: Description) -> Any:
    """Raises: WeightsError: transformers refuses the values."""
    from transformers import AutoConfig

    values = {**described.assumed, **described.stated, "rope_parameters": described.rope.parameters}
    try:
        return AutoConfig.for_model(described.model_type, **values)
    except Exception as error:  # strict dataclass validation raises kinds of its own
        raise WeightsError(
            f"{described.where}: its metadata does not make a {described.model_type} config "
            f"({error})"
        ) from error


class _Draft:
    """A description in the making."""

    def __init__(self, facts: Facts) -> None:
        self.stated: dict[str, Any] = {}
        self.assumed: dict[str, Any] = {}
        self.rotary = 0
        """Dimensions of a head that are turned."""
        self.notices: list[str] = []
        self._facts = facts

    def take(self, name: str, value: Any, *keys: str) -> None:
        """Note a value, which is stated where the file has all these keys."""
        stated = all(map(self._facts.has, keys))
        (self.stated if stated else self.assumed)[name] = value


def _common(facts: Facts, draft: _Draft) -> None:
    hidden, heads = (
        facts.integer("embedding_length", least=1),
        facts.integer("attention.head_count", least=1),
    )
    groups = facts.integer("attention.head_count_kv", heads, least=1)
    if heads % groups:
        raise facts.wrong(
            "attention.head_count_kv",
            f"it must divide attention.head_count, which is {heads}",
            groups,
        )
    draft.take("hidden_size", hidden)
    draft.take("num_hidden_layers", _layers(facts))
    draft.take("num_attention_heads", heads)
    draft.take("num_key_value_heads", groups, "attention.head_count_kv")
    draft.take("rms_norm_eps", facts.number("attention.layer_norm_rms_epsilon"))
    vocab = facts.store.tensors.get("token_embd.weight")
    draft.take(
        "vocab_size", vocab.shape[0] if vocab is not None else facts.integer("vocab_size", least=1)
    )
    draft.assumed.update(
        max_position_embeddings=facts.integer("context_length", 4096, least=1),
        tie_word_embeddings="output.weight" not in facts.store.tensors,
    )
    for name, key in (
        ("bos_token_id", "bos"),
        ("eos_token_id", "eos"),
        ("pad_token_id", "padding"),
    ):
        token = facts.store.metadata.get(f"tokenizer.ggml.{key}_token_id")
        draft.assumed[name] = token if isinstance(token, int) else None


def _layers(facts: Facts) -> int:
    """Decoder layers, without those that predict further tokens."""
    total, ahead = facts.integer("block_count", least=1), facts.integer("nextn_predict_layers", 0)
    if ahead >= total:
        raise facts.wrong(
            "nextn_predict_layers", f"it must be less than block_count, which is {total}", ahead
        )
    held = {int(found[1]) for name in facts.store.tensors if (found := _BLOCK.match(name))}
    if total - ahead > len(held):
        raise facts.wrong("block_count", f"the file has tensors of {len(held)} blocks", total)
    return total - ahead


def _heads(facts: Facts, draft: _Draft) -> None:
    """Heads of one size for queries, keys and values, which are turned whole."""
    hidden, heads = draft.stated["hidden_size"], draft.stated["num_attention_heads"]
    if not facts.has("attention.key_length") and hidden % heads:
        raise facts.wrong(
            "attention.head_count", f"it must divide embedding_length, which is {hidden}", heads
        )
    size = facts.integer("attention.key_length", hidden // heads, least=1)
    draft.take("head_dim", size, "attention.key_length")
    facts.only(
        "attention.value_length", size, f"keys have {size} dimensions, and values must have as many"
    )
    facts.only(
        "rope.dimension_count", size, f"heads have {size} dimensions, all of which must be turned"
    )
    facts.only("attention.scale", size**-0.5, f"only {size**-0.5:.6g} is supported", unset=0)
    draft.rotary = size


def _biases(facts: Facts, *parts: str) -> bool:
    """Whether the first layer has all these biases; biases that stay unread are refused with the
    other tensors.
    """
    return all(f"blk.0.{part}.bias" in facts.store.tensors for part in parts)


_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")


def _chosen(facts: Facts, draft: _Draft, name: str) -> int:
    """Note how many experts there are, as `name`, and how many a token gets, which is returned."""
    experts = facts.integer("expert_count", least=1)
    used = facts.integer("expert_used_count", least=1)
    if used > experts:
        raise facts.wrong(
            "expert_used_count", f"there are expert_count = {experts} to choose from", used
        )
    draft.take(name, experts)
    draft.take("num_experts_per_tok", used)
    return used


def _llama(facts: Facts, draft: _Draft) -> str:
    _common(facts, draft)
    _heads(facts, draft)
    size = facts.integer("feed_forward_length", least=1)
    draft.take("intermediate_size", size)
    if facts.integer("expert_count", 0) == 0:
        draft.assumed.update(
            attention_bias=_biases(facts, *_ATTENTION), mlp_bias=_biases(facts, *_MLP)
        )
        return "llama"
    _chosen(facts, draft, "num_local_experts")
    facts.only(
        "expert_feed_forward_length",
        size,
        f"feed_forward_length is {size}, and it must be the same",
        unset=0,
    )
    window = facts.integer("attention.sliding_window", 0)
    draft.take("sliding_window", window or None, "attention.sliding_window")
    return "mixtral"


def _qwen(model_type: str) -> Callable[[Facts, _Draft], str]:
    def build(facts: Facts, draft: _Draft) -> str:
        _common(facts, draft)
        _heads(facts, draft)
        draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
        if model_type == "qwen3":
            draft.assumed["attention_bias"] = _biases(facts, *_ATTENTION)
        return model_type

    return build


def _qwen_moe(model_type: str) -> Callable[[Facts, _Draft], str]:
    def build(facts: Facts, draft: _Draft) -> str:
        _common(facts, draft)
        _heads(facts, draft)
        _chosen(facts, draft, "num_experts")
        # Only the expert size is stored by some converters; it is then the dense size too.
        expert = facts.integer(
            "expert_feed_forward_length", facts.integer("feed_forward_length", 1), least=1
        )
        draft.take("moe_intermediate_size", expert, "expert_feed_forward_length")
        norm = facts.flag("expert_weights_norm", model_type == "qwen3_moe")
        draft.take("norm_topk_prob", norm, "expert_weights_norm")
        draft.assumed.update(
            intermediate_size=facts.integer("feed_forward_length", expert, least=1),
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
        if model_type == "qwen3_moe":
            draft.assumed["attention_bias"] = _biases(facts, *_ATTENTION)
            window = facts.integer("attention.sliding_window", 0)
            draft.take("use_sliding_window", window > 0, "attention.sliding_window")
            draft.take("sliding_window", window or None, "attention.sliding_window")
            return model_type
        draft.assumed["qkv_bias"] = _biases(facts, *_ATTENTION[:3])
        shared = [
            info
            for name, info in facts.store.tensors.items()
            if name.endswith(".ffn_gate_shexp.weight")
        ]
        size = facts.integer(
            "expert_shared_feed_forward_length", shared[0].shape[0] if shared else expert, least=1
        )
        draft.take("shared_expert_intermediate_size", size, "expert_shared_feed_forward_length")
        return model_type

    return build


def _deepseek(facts: Facts, draft: _Draft) -> str:
    _common(facts, draft)
    # Files with split kv_b describe multi-query attention; the model itself has one key head per
    # query head.
    draft.stated.pop("num_key_value_heads", None)
    draft.assumed["num_key_value_heads"] = draft.stated["num_attention_heads"]
    _latent_heads(facts, draft)
    used = _chosen(facts, draft, "n_routed_experts")
    draft.take("intermediate_size", facts.integer("feed_forward_length", least=1))
    draft.take("moe_intermediate_size", facts.integer("expert_feed_forward_length", least=1))
    draft.take("n_shared_experts", facts.integer("expert_shared_count"))
    shared = draft.stated["n_shared_experts"] * draft.stated["moe_intermediate_size"]
    facts.only(
        "expert_shared_feed_forward_length", shared, f"{shared} is what its experts give", unset=0
    )
    draft.take(
        "first_k_dense_replace",
        facts.integer("leading_dense_block_count", 0),
        "leading_dense_block_count",
    )
    draft.take(
        "routed_scaling_factor", facts.number("expert_weights_scale", 1.0), "expert_weights_scale"
    )
    gating = facts.integer("expert_gating_func", 0)
    groups, group = _groups(facts, draft, used, gating)
    draft.take("n_group", groups, "expert_group_count")
    draft.take("topk_group", group, "expert_group_used_count")
    if gating == _SIGMOID:
        norm = facts.flag("expert_weights_norm", False)
        draft.take("norm_topk_prob", norm, "expert_weights_norm")
        return "deepseek_v3"
    if gating not in (0, 1):  # files without the key are older and softmax
        facts.refuse(f"{facts.architecture}.expert_gating_func is {gating}")
    facts.only(
        "expert_weights_norm", False, "transformers' DeepSeek-V2 does not normalise expert weights"
    )
    draft.take("norm_topk_prob", False, "expert_weights_norm")
    draft.assumed["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    return "deepseek_v2"


def _latent_heads(facts: Facts, draft: _Draft) -> None:
    rope = facts.integer("rope.dimension_count", least=1)
    # Where there are lengths for latent attention, the others are those of the absorbed form.
    key = facts.integer(
        "attention.key_length_mla", facts.integer("attention.key_length", 0), least=1
    )
    value = facts.integer(
        "attention.value_length_mla", facts.integer("attention.value_length", 0), least=1
    )
    if key <= rope:
        raise facts.wrong(
            "rope.dimension_count", f"it must be less than the keys' length, which is {key}", rope
        )
    rank = (
        facts.integer("attention.q_lora_rank", least=1)
        if facts.has("attention.q_lora_rank")
        else None
    )
    draft.take("q_lora_rank", rank, "attention.q_lora_rank")
    draft.take("kv_lora_rank", facts.integer("attention.kv_lora_rank", least=1))
    draft.take("qk_rope_head_dim", rope)
    draft.take("qk_nope_head_dim", key - rope)
    draft.take("v_head_dim", value)
    first = ("attn_q_a",) if rank is not None else ()
    draft.assumed["attention_bias"] = _biases(facts, *first, "attn_kv_a_mqa", "attn_output")
    draft.rotary = rope


_SIGMOID = 2
"""The gating function that came with DeepSeek-V3."""
_GROUPED = {
    # (experts, how many a token gets, gating function): (groups, how many a token may choose from)
    (160, 6, 0): (8, 3),  # V2, V2.5, Coder-V2
    (256, 8, _SIGMOID): (8, 4),  # V3, R1
}
"""Released models with groups of experts, which older converters left out of the file."""


def _groups(facts: Facts, draft: _Draft, used: int, gating: int) -> tuple[int, int]:
    """(groups of experts, how many of them a token may choose from)."""
    experts = draft.stated["n_routed_experts"]
    released = _GROUPED.get((experts, used, gating if gating == _SIGMOID else 0))
    if released and not (facts.has("expert_group_count") or facts.has("expert_group_used_count")):
        groups, chosen = released
        draft.notices.append(
            "it does not state how its experts are grouped: a token chooses from "
            f"{chosen} of {groups} groups, as in DeepSeek's released model of this size; give its "
            f"config.json with "
            "--model_path if this is another model"
        )
        return released
    groups = facts.integer("expert_group_count", 1) or 1
    chosen = facts.integer("expert_group_used_count", 1) or 1
    if experts % groups:
        raise facts.wrong(
            "expert_group_count", f"it must divide expert_count, which is {experts}", groups
        )
    if chosen > groups:
        raise facts.wrong(
            "expert_group_used_count", f"there are expert_group_count = {groups}", chosen
        )
    if used > chosen * (experts // groups):
        room = f"{chosen} of {groups} groups hold {chosen * (experts // groups)} experts"
        raise facts.wrong("expert_used_count", room, used)
    return groups, chosen


_BUILDERS: Mapping[str, Callable[[Facts, _Draft], str]] = {
    "llama": _llama,
    "qwen2": _qwen("qwen2"),
    "qwen3": _qwen("qwen3"),
    "qwen2moe": _qwen_moe("qwen2_moe"),
    "qwen3moe": _qwen_moe("qwen3_moe"),
    "deepseek2": _deepseek,
}
