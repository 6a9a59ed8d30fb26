"""Tokenizer and chat template, from the model directory or from the GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.experts.gguf_store import GGUFStore

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

_DEEPSEEK_SPLITS = {
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
"""`tokenizer.ggml.pre` -> the patterns at which DeepSeek splits text before merging, one after another."""


def load_tokenizer(model_path: str | Path | None, store: GGUFStore) -> Any:
    """The tokenizer with its chat template; None where neither source holds one.

    Raises:
        WeightsError: a tokenizer is there and cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        if model_path is not None and any((Path(model_path) / name).exists() for name in _FILES):
            return AutoTokenizer.from_pretrained(str(model_path))
        if "tokenizer.ggml.tokens" in store.metadata:
            path = store.paths[0]
            if store.architecture == "deepseek2":
                return _deepseek(store)
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # transformers and tokenizers raise many kinds
        where = model_path if model_path is not None else store.paths[0]
        raise WeightsError(
            f"{where}: its tokenizer cannot be read ({type(error).__name__}: {error}); "
            "give model_path, a directory with the model's own tokenizer"
        ) from error
    return None


def _deepseek(store: GGUFStore) -> Any:
    """transformers reads tokenizers from GGUF files, but only for architectures that it loads from there."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, vocabulary, config = get_gguf_tokenizer(str(store.paths[0]))
    backend, more = convert_gguf_tokenizer(architecture, vocabulary)
    splits = _DEEPSEEK_SPLITS.get(vocabulary.get("pre_tokenizer_type", ""))
    if splits is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **config, **more)
