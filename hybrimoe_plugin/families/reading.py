"""Reads a transformers config from GGUF metadata: the parts that several families share."""

from __future__ import annotations

import re
from typing import Any

from hybrimoe_plugin.families.gguf_facts import Facts

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
"""Projections whose biases `has_biases` looks for."""

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


class Draft:
    """Values of a transformers config, as a family's `describe` collects them."""

    def __init__(self, facts: Facts) -> None:
        self.stated: dict[str, Any] = {}
        """What the file states."""
        self.assumed: dict[str, Any] = {}
        """What it leaves open, as llama.cpp understands it; a config.json may say otherwise."""
        self.by_layer: dict[str, list[Any]] = {}
        """What the file states for each layer by itself, as `per_layer_config` has it."""
        self.rope_width = 0
        """Dimensions of a head that have a rotary embedding."""
        self.sliding_rope_width = 0
        """The same in layers with a sliding window, where their embedding is another one."""
        self.rope_by_context = False
        """Whether the embedding may depend on the length of the text, in files of this family."""
        self.more_of_rope: dict[str, Any] = {}
        """Parameters of the embedding that no file states, or states in another way."""
        self.notices: list[str] = []
        """What is taken for granted and the user should know, if the file is all there is."""
        self.left_open: list[str] = []
        """What only a config.json can say; the file alone is refused."""
        self._facts = facts

    def take(self, name: str, value: Any, *keys: str) -> None:
        """Note a value; it is stated where the file has all these keys."""
        stated = all(map(self._facts.has, keys))
        values = self.stated if stated else self.assumed
        values[name] = value


def read_common(facts: Facts, draft: Draft, *, groups_by_layer: bool = False) -> None:
    """What every decoder has: widths, layers, heads, norms, vocabulary and special tokens.

    Args:
        groups_by_layer: whether layers may differ in their number of key heads.

    Raises:
        WeightsError: a value is missing or out of range.

    Mutates: `draft`.
    """
    hidden = facts.integer("embedding_length", least=1)
    heads = facts.integer("attention.head_count", least=1)
    draft.take("hidden_size", hidden)
    draft.take("num_hidden_layers", _layers(facts))
    draft.take("num_attention_heads", heads)
    if groups_by_layer:
        layers = draft.stated["num_hidden_layers"]
        every = facts.integers("attention.head_count_kv", layers, heads, least=1)
        draft.by_layer["num_key_value_heads"] = every
    else:
        every = [facts.integer("attention.head_count_kv", heads, least=1)]
        draft.take("num_key_value_heads", every[0], "attention.head_count_kv")
    for groups in every:
        if heads % groups:
            why = f"it must divide attention.head_count, which is {heads}"
            raise facts.wrong("attention.head_count_kv", why, groups)
    draft.take("rms_norm_eps", facts.number("attention.layer_norm_rms_epsilon"))
    draft.take("vocab_size", read_vocabulary(facts))
    context = facts.integer("context_length", 4096, least=1)
    draft.assumed["max_position_embeddings"] = context
    draft.assumed["tie_word_embeddings"] = "output.weight" not in facts.store.tensors
    for name, key in _TOKENS.items():
        token = facts.store.metadata.get(f"tokenizer.ggml.{key}_token_id")
        draft.assumed[name] = token if isinstance(token, int) else None


def read_heads(facts: Facts, draft: Draft, partial: bool = False, scaled: bool = False) -> None:
    """Heads of one size for queries, keys and values, with a rotary embedding.

    Needs `read_common` first.

    Args:
        partial: whether the embedding may have only the first of a head's dimensions.
        scaled: whether the family reads `attention.scale` itself.

    Raises:
        WeightsError: a value is out of range.

    Mutates: `draft`.
    """
    hidden = draft.stated["hidden_size"]
    heads = draft.stated["num_attention_heads"]
    if not facts.has("attention.key_length") and hidden % heads:
        raise facts.wrong(
            "attention.head_count",
            f"it must divide embedding_length, which is {hidden}",
            heads,
        )
    size = facts.integer("attention.key_length", hidden // heads, least=1)
    draft.take("head_dim", size, "attention.key_length")
    facts.only(
        "attention.value_length",
        size,
        f"keys have {size} dimensions, and values must have as many",
    )
    draft.rope_width = size
    if partial:
        draft.rope_width = facts.integer("rope.dimension_count", size, least=1)
        draft.more_of_rope["partial_rotary_factor"] = draft.rope_width / size
    else:
        facts.only(
            "rope.dimension_count",
            size,
            f"heads have {size} dimensions, all of which must have a rotary embedding",
        )
    if not scaled:
        scale = size**-0.5
        facts.only("attention.scale", scale, f"only {scale:.6g} is supported", unset=0)


def read_experts(
    facts: Facts, draft: Draft, name: str, used_name: str = "num_experts_per_tok"
) -> int:
    """Note the number of routed experts as `name`, and how many a token gets; gives the latter.

    Raises:
        WeightsError: a value is missing or out of range.

    Mutates: `draft`.
    """
    experts = facts.integer("expert_count", least=1)
    used = facts.integer("expert_used_count", least=1)
    if used > experts:
        raise facts.wrong(
            "expert_used_count",
            f"there are expert_count = {experts} to choose from",
            used,
        )
    draft.take(name, experts)
    draft.take(used_name, used)
    return used


def sparse_layers(facts: Facts, draft: Draft) -> list[bool]:
    """For each decoder layer, whether the file has routed experts of it. Needs `read_common`."""
    layers = range(draft.stated["num_hidden_layers"])
    return [f"blk.{layer}.ffn_gate_inp.weight" in facts.store.tensors for layer in layers]


def has_biases(facts: Facts, *parts: str) -> bool:
    """Whether the first layer has all these biases.

    Biases that no parameter is made from are refused later, with the other tensors.
    """
    return all(f"blk.0.{part}.bias" in facts.store.tensors for part in parts)


def read_vocabulary(facts: Facts) -> int:
    """Tokens of the vocabulary, rows of padding included. Raises: WeightsError: not stated."""
    embedding = facts.store.tensors.get("token_embd.weight")
    if embedding is None:
        return facts.integer("vocab_size", least=1)
    return embedding.shape[0]


def _layers(facts: Facts) -> int:
    """Decoder layers, without those that predict further tokens."""
    total = facts.integer("block_count", least=1)
    ahead = facts.integer("nextn_predict_layers", 0)
    if ahead >= total:
        raise facts.wrong(
            "nextn_predict_layers",
            f"it must be less than block_count, which is {total}",
            ahead,
        )
    blocks = map(_BLOCK.match, facts.store.tensors)
    held = {int(found[1]) for found in blocks if found}
    if total - ahead > len(held):
        raise facts.wrong("block_count", f"the file has tensors of {len(held)} blocks", total)
    return total - ahead
