"""The sound models that are damaged, and the command line's own chat with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from eval.models import tiny
from hybrimoe_plugin.cli.main import main

_EXACT = ("gate_inp", "attn_q", "kv_b", "k_b", "v_b", "kv_a")
"""Matrices of tiny models whose rows are no whole blocks."""
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
_VOCABULARY = 320


def write(folder: Path, family: str) -> Path:
    """A tiny model with a tokenizer."""
    folder.mkdir(parents=True)

    def kind(name: str) -> str:
        return "F32" if any(part in name for part in _EXACT) else "Q8_0"

    changes = {"vocab_size": _VOCABULARY, "max_position_embeddings": 4096}
    return tiny.write(folder, family, changes=changes, types=kind, extra=_tokenizer())


def _tokenizer() -> dict[str, Any]:
    tokens = [
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<unk>",
        *sorted(ByteLevel.alphabet()),
        "Ġt",
        "he",
        "in",
        "an",
    ]
    tokens += [f"<extra{number}>" for number in range(len(tokens), _VOCABULARY)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(tokens) - 4),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "i n", "a n"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _TEMPLATE,
    }


class Chat:
    """A call of `hybrimoe local_chat` for two tokens."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments

    def __call__(self) -> int:
        return main(
            ["local_chat", "--prompt", "hi", "--max_new_tokens", "2", "--greedy", *self.arguments]
        )
