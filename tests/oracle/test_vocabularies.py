"""Vocabularies and chat templates of released models, as far as llama.cpp ships them."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers.chat.template import ChatTemplate
from hybrimoe_plugin.hosts.transformers.tokenizer import load_tokenizer
from hybrimoe_plugin.weights.gguf_store import GGUFStore

BETWEEN_TEXTS = "\n__ggml_vocab_test__\n"
VOCABULARIES = (
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",  # Mixtral's kind
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",  # Granite's kind
    "starcoder",
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hi <there> & "you"'},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Größe?"},
]
NEED_TOOLS = ("tool_use", "Hermes-", "firefunction")
"""Templates, by parts of their names, that fail in transformers too when no tools are given."""
CONVERSATIONS = {"whole": CONVERSATION, "no system": CONVERSATION[1:], "first": CONVERSATION[1:2]}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_texts_are_the_tokens_that_llama_cpp_ships(name: str, llama_cpp: Path) -> None:
    path = llama_cpp / "models" / f"ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(None, GGUFStore([path]))
    texts = _beside(path, ".inp").split(BETWEEN_TEXTS)
    rows = [[int(token) for token in line.split()] for line in _beside(path, ".out").splitlines()]
    assert len(rows) > 40
    # The last text has no row. Qwen joins letters and accents first, in transformers;
    # llama.cpp does not, so its rows for texts that are not joined are other ones.
    joined = [unicodedata.is_normalized("NFC", text) for text in texts]
    skipped = 0
    for text, row, same in zip(texts, rows, joined, strict=False):
        if name == "qwen35" and not same:
            skipped += 1
            continue
        assert tokenizer.encode(text, add_special_tokens=False) == row, text
    assert skipped <= 3


def _beside(path: Path, suffix: str) -> str:
    return path.with_name(path.name + suffix).read_text(encoding="utf-8")


def test_chat_templates_render_as_in_transformers(llama_cpp: Path) -> None:
    paths = sorted((llama_cpp / "models" / "templates").glob("*.jinja"))
    assert len(paths) > 50
    rendered = 0
    for path in paths:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, [])),
            bos_token="<s>",
            eos_token="</s>",
            chat_template=path.read_text(encoding="utf-8"),
        )
        template = ChatTemplate(tokenizer)
        for case, messages in CONVERSATIONS.items():
            right = _right(tokenizer, messages)
            if right is None:
                with pytest.raises(ConfigError):
                    template.render(messages)
                assert "gemma-2" in path.name or any(part in path.name for part in NEED_TOOLS)
            else:
                assert template.render(messages) == right, (path.name, case)
                rendered += 1
        template.close()
    assert rendered > 150


def _right(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """As transformers renders it; None where its template refuses or fails."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # of jinja2, and what templates raise
        return None
    return str(text)
