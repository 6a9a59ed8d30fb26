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

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens: transformers' name -> GGUF's."""

_CONTROL = 3
_WHOLE = (_CONTROL, 4)
"""Kinds in `tokenizer.ggml.token_type` whose tokens are not split: those that control the model, user-defined ones."""


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
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            return _corrected(tokenizer, store)
    except Exception as error:  # transformers and tokenizers raise many kinds
        where = model_path if model_path is not None else store.paths[0]
        raise WeightsError(
            f"{where}: its tokenizer cannot be read ({type(error).__name__}: {error}); "
            "give model_path, a directory with the model's own tokenizer"
        ) from error
    return None


def _corrected(tokenizer: Any, store: GGUFStore) -> Any:
    """What the file says about special tokens, which not every release of transformers reads, or reads rightly.

    Mutates: `tokenizer`.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for index, token in _whole_tokens(store) if known.get(token.content) == index])
    texts = {name: text for name, text in _special_texts(store).items() if text is not None}
    tokenizer.add_special_tokens({name: _added(text, True) for name, text in texts.items()})
    for name, flag in _flags(store).items():
        setattr(tokenizer, name, flag)
    return tokenizer


def _deepseek(store: GGUFStore) -> Any:
    """DeepSeek's byte-level BPE out of the file's metadata.

    Not through transformers, which reads this architecture's tokenizer in some releases only, and there loses the
    places of special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre, tokens, merges = (
        store.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre", "tokens", "merges")
    )
    if kind != "gpt2" or tokens is None or merges is None:
        raise ValueError(f"byte-level BPE with merges is expected, tokenizer.ggml.model is {kind!r}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    splits = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _DEEPSEEK_SPLITS.get(pre or "", ())
    ]
    # A vocabulary whose patterns are not known is split as GPT-2's was, which ByteLevel does itself.
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([token for _, token in _whole_tokens(store)])
    template = store.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **_special_texts(store), **_flags(store)
    )


def _special_texts(store: GGUFStore) -> dict[str, str | None]:
    """`bos_token` and so on; None where the file names none."""
    tokens = store.metadata["tokenizer.ggml.tokens"]
    ids = {name: store.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return {f"{name}_token": None if index is None else tokens[index] for name, index in ids.items()}


def _flags(store: GGUFStore) -> dict[str, bool]:
    """Whether bos and eos are put around every text, where the file says so."""
    names = ("add_bos_token", "add_eos_token")
    found = {name: store.metadata.get(f"tokenizer.ggml.{name}") for name in names}
    if store.metadata.get("tokenizer.ggml.model") == "llama" and found["add_bos_token"] is None:
        found["add_bos_token"] = True  # older files have no flag, and SentencePiece models were trained with bos
    return {name: flag for name, flag in found.items() if flag is not None}


def _whole_tokens(store: GGUFStore) -> list[tuple[int, Any]]:
    """Index and token of what is found in text as a whole, before anything is split."""
    tokens, kinds = (store.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    pairs = enumerate(zip(tokens or (), kinds or (), strict=False))
    return [(index, _added(token, kind == _CONTROL)) for index, (token, kind) in pairs if kind in _WHOLE]


def _added(text: str, special: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(text, normalized=False, special=special)
