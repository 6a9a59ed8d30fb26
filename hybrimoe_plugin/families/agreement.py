"""Whether a config.json and a GGUF file describe the same model."""

from __future__ import annotations

import math
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.description import Description, describe
from hybrimoe_plugin.families.family import Family
from hybrimoe_plugin.families.gguf_facts import Facts
from hybrimoe_plugin.families.reading import read_vocabulary
from hybrimoe_plugin.families.registry import find_family
from hybrimoe_plugin.families.rope import difference
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import chosen_experts, expert_counts

PADDING_ROWS = 512
"""Tokens by which vocabularies of one tokenizer may differ: some converters drop rows of padding,
others add them.
"""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of one thing, which differ between families."""
_ABSENT_IF_NONE = ("sliding_window", "final_logit_softcapping", "clip_qkv")
"""Settings whose None says that the model has no such thing."""
_CLOSE = 1e-5
"""Relative difference that comes of the file's float32."""


def check_same_model(config: Any, described: Description, directory: str) -> None:
    """Compare what a directory's config and the GGUF file both state.

    Raises:
        WeightsError: naming both values.
    """
    kind = described.family.model_type
    wrong = []
    if not _same_type(config.model_type, kind):
        wrong.append(_clash("model_type", config.model_type, kind))
    for name, theirs in described.stated.items():
        ours = getattr(config, name, None)
        left_open = ours is None and name not in _ABSENT_IF_NONE
        if not left_open and not _agree(name, ours, theirs):
            shown = "number of experts" if name in _EXPERTS else name
            wrong.append(_clash(shown, ours, theirs))
    for name, theirs in described.by_layer.items():
        ours = [getattr(config.per_layer_config[layer], name) for layer in range(len(theirs))]
        if ours != theirs:
            wrong.append(_clash(f"{name} by layer", ours, theirs))
    if not wrong:
        found = difference(config, described.ropes)
        wrong = [] if found is None else [found]
    if wrong:
        raise WeightsError(f"{directory} does not match {described.where}: {'; '.join(wrong)}")


def check_and_follow(config: Any, store: GGUFStore, directory: str) -> None:
    """Compare a directory's config with a file, and take from the file what is the weights' own.

    That is rows of padding, and a head of its own. The config comes first: the file need not state
    all that the model is, only nothing else.

    Raises:
        WeightsError: they do not describe the same model, or nobody knows how files of this kind
            of model store it.

    Mutates: `config`.
    """
    family = find_family(config.model_type)
    if family is None:
        raise WeightsError(
            f"{store.paths[0]}: how GGUF files store a {config.model_type} model is not known "
            "here, and converters change values of some families; load the model from its "
            "checkpoint directory (safetensors), which works for every family"
        )
    facts = Facts(store)
    if _leaves_type_open(family, facts):
        _check_sizes(config, facts, directory)
    else:
        check_same_model(config, describe(store), directory)
    config.vocab_size = read_vocabulary(facts)
    if "output.weight" in store.tensors:
        config.tie_word_embeddings = False


def _leaves_type_open(family: Family, facts: Facts) -> bool:
    """Whether the config must say which family a file is of, as several have files like it.

    Which family's tensors it has is checked with the tensors.
    """
    known = facts.architecture in family.architectures
    return known and family.is_one_of_several and not family.holds(facts)


def _check_sizes(config: Any, facts: Facts, directory: str) -> None:
    """Compare what files of every architecture state."""
    ahead = facts.integer("nextn_predict_layers", 0)
    stated = {
        "num_hidden_layers": facts.integer("block_count", least=1) - ahead,
        "hidden_size": facts.integer("embedding_length", least=1),
        "num_attention_heads": facts.integer("attention.head_count", least=1),
        "vocab_size": read_vocabulary(facts),
    }
    wrong = [
        _clash(name, getattr(config, name), value)
        for name, value in stated.items()
        if not _agree(name, getattr(config, name), value)
    ]
    experts, _ = expert_counts(config)
    for shown, ours, key in (
        ("number of experts", experts, "expert_count"),
        ("experts of a token", chosen_experts(config), "expert_used_count"),
    ):
        found = facts.integer(key, least=1)
        if ours != found:
            wrong.append(_clash(shown, ours, found))
    if wrong:
        raise WeightsError(f"{directory} does not match {facts.where}: {'; '.join(wrong)}")


def _clash(name: str, ours: Any, theirs: Any) -> str:
    return f"{name} is {ours} there and {theirs} in the GGUF"


def _same_type(ours: str, theirs: str) -> bool:
    """Whether files of one type look like those of the other, or are the same."""
    if ours == theirs:
        return True
    family = find_family(ours)
    return family is not None and family.stored_as == theirs


def _agree(name: str, ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list) and not isinstance(theirs, list) and ours:
        # Some configs state a number for each layer.
        return all(_agree(name, one, theirs) for one in ours)
    if name == "vocab_size":
        return abs(ours - theirs) < PADDING_ROWS
    if not isinstance(ours, float) and not isinstance(theirs, float):
        return bool(ours == theirs)
    if not isinstance(ours, int | float):
        return False
    return math.isclose(ours, theirs, rel_tol=_CLOSE)
