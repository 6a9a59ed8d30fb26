"""A tokenizer of bytes with a chat template, and a model that has nothing but a config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking %}<think>\n{% endif %}"
    "{% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}"
)
"""As Qwen's in what matters here."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other|>")
_SIGNS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def byte_tokenizer(chat_template: str | None = CHATML) -> Any:
    """Each byte is a token, and so is each sign of a conversation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in _SIGNS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=chat_template
    )


def named_model(model_type: str = "qwen3_moe", rows: int = 264, **generation: Any) -> Any:
    """A model of this type, with so many tokens and this generation config."""
    return SimpleNamespace(
        config=SimpleNamespace(model_type=model_type),
        generation_config=SimpleNamespace(**generation),
        get_input_embeddings=lambda: SimpleNamespace(num_embeddings=rows),
    )
