"""From a prompt's text to tokens that the model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_plugin.errors import ConfigError


def encode(model: Any, tokenizer: Any, text: str, add_special_tokens: bool) -> torch.Tensor:
    """The tokens of a text, [1, T] int64 on the CPU.

    Args:
        add_special_tokens: put around the text what the tokenizer puts around every text. A chat
            template has done so already.

    Raises:
        ConfigError: the tokenizer cannot read the text, it has no tokens, or ones that the model
            does not have.
    """
    try:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
        ids = encoded.input_ids
    except Exception as error:  # tokenizers raise many kinds
        kind = type(error).__name__
        raise ConfigError(f"the tokenizer cannot read the prompt ({kind}: {error})") from error
    assert isinstance(ids, torch.Tensor)
    if ids.shape[1] == 0:
        raise ConfigError("the message has no tokens")
    check_known(model, tokenizer, [int(ids.max())])
    return ids


def check_known(model: Any, tokenizer: Any, ids: Sequence[int]) -> None:
    """Raise ConfigError for ids beyond the embedding; native code would read past its end."""
    rows = embedding_rows(model)
    largest = max(ids)
    if rows is not None and largest >= rows:
        text = tokenizer.decode([largest])
        raise ConfigError(
            f"the tokenizer gives token {largest} ({text!r}), and the model's embedding has "
            f"{rows} rows: the tokenizer is another model's"
        )


def embedding_rows(model: Any) -> int | None:
    """How many tokens the model has; None where it does not say."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    rows: int | None = getattr(table, "num_embeddings", None)
    return rows
