"""Tokenizer and chat template, from the model directory or from the GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.experts.gguf_store import GGUFStore

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


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
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # transformers and tokenizers raise many kinds
        where = model_path if model_path is not None else store.paths[0]
        raise WeightsError(f"{where}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error
    return None
