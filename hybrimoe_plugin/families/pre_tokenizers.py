"""How byte-level vocabularies split text before merging, by the kind that a GGUF file names.

The patterns are those of the models' own tokenizer.json files. A kind that is not here is refused:
taking another's patterns gives other tokens than the model was trained on, and nobody would see it.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.registry import usual_split

log = logging.getLogger(__name__)

SENTENCE_PIECE, BYTE_LEVEL, MARKED_SPACES = "llama", "gpt2", "gemma4"
"""Values of `tokenizer.ggml.model`: the kinds of tokenizer that are read, under the names of the
first models that had them.
"""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_NO_HAN = r"&&[^\p{Han}]]"

_LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_REST}",)
_QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_REST}",)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}",
)
_TEKKEN = (rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS_SLASH}|{_REST}",)
_GPT4O = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_REST}",
)
_KIMI_UPPER, _KIMI_LOWER = (part[:-1] + _NO_HAN for part in (_UPPER, _LOWER))
_KIMI = (
    rf"\p{{Han}}+|{_HEAD}{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS}|{_REST}",
)
_SEED = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_REST}",)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Splits(NamedTuple):
    """How one kind of vocabulary splits text."""

    patterns: tuple[str, ...] = ()
    """Split at these, one after another."""
    gpt2: bool = False
    """What is left is split as GPT-2 does."""
    whole_words: bool = False
    """A piece that is a token as a whole is not built from merges."""
    composed: bool = False
    """Letters and their accents are joined first (Unicode's NFC)."""


_LLAMA3_LIKE = Splits(_LLAMA3, whole_words=True)
_QWEN2_LIKE = Splits(_QWEN2, composed=True)
_GPT2_LIKE = Splits(gpt2=True)
_DIGITS = Splits((r"\p{N}",), gpt2=True)

_KINDS: dict[str, Splits] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3_LIKE,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Splits(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), _QWEN2_LIKE),
    **dict.fromkeys(("stablelm2", "hunyuan"), Splits(_QWEN2)),
    "qwen35": Splits(_QWEN35, composed=True),
    "tekken": Splits(_TEKKEN, whole_words=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Splits(_GPT4O)),
    "kimi-k2": Splits(_KIMI, whole_words=True),
    "seed-coder": Splits(_SEED),
    "deepseek-llm": Splits(_DEEPSEEK_LLM),
    "deepseek-coder": Splits(_DEEPSEEK_CODER),
    "deepseek-v3": Splits(_DEEPSEEK_V3),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "a.x-4.0", "gigachat", "exaone4"),
        _GPT2_LIKE,
    ),
}
"""`tokenizer.ggml.pre` -> how text is split."""


def splits_of(kind: Any, architecture: str, where: str) -> Splits:
    """How a file's vocabulary splits text.

    Args:
        kind: `tokenizer.ggml.pre`, None where the file has none.
        architecture: of the file.
        where: the file, for messages.

    Raises:
        WeightsError: a kind that is not known here.
    """
    usual = usual_split(architecture)
    if kind in (None, "", "default") and usual is not None:
        log.warning(
            "%s does not say how its tokenizer splits text (tokenizer.ggml.pre); %r is taken, as "
            "is usual for %s: where answers are poor, give model_path with the model's own "
            "tokenizer",
            where,
            usual,
            architecture,
        )
        kind = usual
    if not isinstance(kind, str) or kind not in _KINDS:
        raise WeightsError(
            f"{where}: its tokenizer splits text in a way that is not known here "
            f"(tokenizer.ggml.pre is {kind!r}); give model_path, a directory with the model's own "
            "tokenizer"
        )
    return _KINDS[kind]


def pre_tokenizer(splits: Splits) -> Any:
    """A `tokenizers` pre-tokenizer that gives pieces of byte-level characters."""
    from tokenizers import Regex, pre_tokenizers

    parts = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits.patterns
    ]
    return pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits.gpt2)]
    )
