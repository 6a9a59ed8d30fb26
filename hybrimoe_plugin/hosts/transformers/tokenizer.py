"""Tokenizer and chat template, from the model directory or from the GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hybrimoe_plugin.errors import HybriMoEError, WeightsError
from hybrimoe_plugin.families.pre_tokenizers import (
    BYTE_LEVEL,
    GEMMA,
    SENTENCE_PIECE,
    pre_tokenizer,
    splits_of,
)
from hybrimoe_plugin.hosts.ends import looks_like_an_end
from hybrimoe_plugin.hosts.transformers.directory import check_tokenizer_files
from hybrimoe_plugin.weights.gguf_store import GGUFStore

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
"""A directory with one of these has a tokenizer."""

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens: transformers' name -> GGUF's."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_BLANK = "▁"
"""SentencePiece's sign for a blank."""
_LONGEST = 1024
"""Characters of one of SentencePiece's tokens. In released models it is below 100."""
_WHOLE = (_CONTROL, _USER_DEFINED)
"""Kinds in `tokenizer.ggml.token_type` whose tokens are not split: those that control the model,
user-defined ones.
"""


def load_tokenizer(model_path: str | Path | None, store: GGUFStore, config: Any = None) -> Any:
    """The tokenizer with its chat template; None where neither source holds one.

    Args:
        config: the model's, by which transformers chooses the directory's tokenizer class.

    Raises:
        WeightsError: a tokenizer is there and cannot be read.
        ConfigError: the directory's tokenizer is code of its own.
    """
    if has_tokenizer(model_path):
        assert model_path is not None
        return directory_tokenizer(model_path, config)
    if "tokenizer.ggml.tokens" not in store.metadata:
        return None
    read = _READERS.get(str(store.metadata.get("tokenizer.ggml.model")), _refuse)
    with _reading(
        str(store.paths[0]), "; give model_path, a directory with the model's own tokenizer"
    ):
        _check_kinds(store)
        return read(store)


def has_tokenizer(directory: str | Path | None) -> bool:
    """Whether a directory is named that holds a tokenizer."""
    if directory is None:
        return False
    return any((Path(directory) / name).exists() for name in TOKENIZER_FILES)


def directory_tokenizer(directory: str | Path, config: Any = None) -> Any:
    """The tokenizer that a directory's files describe; nothing there is run, nothing fetched.

    Args:
        config: of the model; without it the tokenizer's own files say which class it is.

    Raises:
        WeightsError: it cannot be read.
        ConfigError: it is code of its own.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    check_tokenizer_files(directory)
    # Given a config, transformers does not look for one in the directory.
    config = PreTrainedConfig() if config is None else config
    with _reading(str(directory)):
        return AutoTokenizer.from_pretrained(
            str(directory), config=config, trust_remote_code=False, local_files_only=True
        )


@contextmanager
def _reading(where: str, advice: str = "") -> Iterator[None]:
    """Whatever transformers and tokenizers raise on what they read becomes a WeightsError."""
    try:
        yield
    except HybriMoEError:
        raise
    except BaseException as error:
        # A panic in tokenizers' Rust code is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise WeightsError(
            f"{where}: its tokenizer cannot be read ({type(error).__name__}: {error}){advice}"
        ) from error


# Not through transformers: releases differ in the architectures that they read, in which kinds of
# splitting they know, lose the places of special tokens, and SentencePiece's blank at the start.


def _byte_level(store: GGUFStore) -> Any:
    """Byte-level BPE out of the file's metadata."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    where = str(store.paths[0])
    splits = splits_of(store.metadata.get("tokenizer.ggml.pre"), store.architecture, where)
    backend = Tokenizer(
        models.BPE(_vocabulary(store), _merges(store), ignore_merges=splits.whole_words)
    )
    if splits.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(splits)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, store)


def _sentence_piece(store: GGUFStore) -> Any:
    """BPE over whole texts, merged by the scores of the tokens.

    Texts, also those between special tokens, begin with a blank, unless the file says otherwise.
    """
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = _vocabulary(store)
    longest = max(map(len, vocabulary), default=0)
    if longest > _LONGEST:  # every way to cut each token in two is looked up
        raise ValueError(f"a token has {longest} characters, where {_LONGEST} are expected at most")
    scores = dict(zip(vocabulary, store.metadata["tokenizer.ggml.scores"], strict=True))
    kinds = store.metadata["tokenizer.ggml.token_type"]
    # Tokens that control the model and the 256 that stand for bytes are not made of others.
    apart = {text for text, kind in zip(vocabulary, kinds, strict=True) if kind != _NORMAL}
    merges = generate_merges(vocabulary, scores, skip_tokens=apart)
    begins = store.metadata.get("tokenizer.ggml.add_space_prefix", True)
    return _finished(_pieces(store, merges, begins), store)


def _gemma(store: GGUFStore) -> Any:
    """SentencePiece's tokens with merges in the order that the file gives."""
    return _finished(_pieces(store, _merges(store), begins=False), store)


def _pieces(store: GGUFStore, merges: list[tuple[str, str]], begins: bool) -> Any:
    """A backend whose tokens hold a sign for blanks, and bytes for what no token spells."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    backend = Tokenizer(
        models.BPE(
            _vocabulary(store),
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=_special_texts(store)["unk_token"],
        )
    )
    first: list[Any] = [normalizers.Prepend(_BLANK)] if begins else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _BLANK)])
    last: list[Any] = [decoders.Strip(" ", 1, 0)] if begins else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return backend


def _refuse(store: GGUFStore) -> NoReturn:
    kind = store.metadata.get("tokenizer.ggml.model")
    raise ValueError(
        f"SentencePiece, or byte-level BPE with merges, is expected; tokenizer.ggml.model is "
        f"{kind!r}"
    )


_READERS = {SENTENCE_PIECE: _sentence_piece, BYTE_LEVEL: _byte_level, GEMMA: _gemma}
"""`tokenizer.ggml.model` -> what reads it."""


def _finished(backend: Any, store: GGUFStore) -> Any:
    """The tokenizer around a backend, which finds special tokens in a text before all else."""
    from transformers import PreTrainedTokenizerFast

    backend.add_tokens([token for _, token in _whole_tokens(store)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=store.metadata.get("tokenizer.chat_template"),
        **_special_texts(store),
        **_flags(store),
    )


def _check_kinds(store: GGUFStore) -> None:
    """Raise ValueError for values that transformers would take for something else."""
    for key, kind in _KINDS_OF_VALUES.items():
        value = store.metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{key} is {value!r:.80}, where a {kind.__name__} is expected")


_KINDS_OF_VALUES = {
    "tokenizer.ggml.tokens": list,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
    "tokenizer.chat_template": str,
}


def _vocabulary(store: GGUFStore) -> dict[str, int]:
    """Tokens and their ids. Raises: ValueError: a token has two ids."""
    tokens = store.metadata["tokenizer.ggml.tokens"]
    found: dict[str, int] = {}
    for index, token in enumerate(tokens):
        # Unused ids may have no text. Of two others with the same text, one could not be decoded.
        if found.setdefault(token, index) != index and token:
            raise ValueError(f"tokens {found[token]} and {index} are both {token!r:.80}")
    return found


def _merges(store: GGUFStore) -> list[tuple[str, str]]:
    """Pairs to join, the first ones first; a part may begin with a blank itself.

    Raises:
        ValueError: a pair or what it makes is no token. tokenizers panics on some of these.
    """
    merges = store.metadata.get("tokenizer.ggml.merges")
    if merges is None:
        _refuse(store)
    known = set(store.metadata["tokenizer.ggml.tokens"])
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges for at in [merge.index(" ", 1)]]
    for first, second in pairs:
        if not known.issuperset((first, second, first + second)):
            raise ValueError(f"the merge of {first!r:.80} and {second!r:.80} names no tokens")
    return pairs


def _special_texts(store: GGUFStore) -> dict[str, str | None]:
    """`bos_token` and so on; None where the file names none, which some converters write as -1."""
    tokens = store.metadata["tokenizer.ggml.tokens"]
    found: dict[str, str | None] = {}
    for name, key in _SPECIAL.items():
        index = store.metadata.get(f"tokenizer.ggml.{key}_token_id")
        known = type(index) is int and 0 <= index < len(tokens)
        found[f"{name}_token"] = tokens[index] if known else None
    return found


def _flags(store: GGUFStore) -> dict[str, bool]:
    """Whether bos and eos are put around every text, where the file says so."""
    names = ("add_bos_token", "add_eos_token")
    found = {name: store.metadata.get(f"tokenizer.ggml.{name}") for name in names}
    kind = store.metadata.get("tokenizer.ggml.model")
    if kind == SENTENCE_PIECE and found["add_bos_token"] is None:
        # Older files have no flag, and SentencePiece models were trained with bos.
        found["add_bos_token"] = True
    return {name: flag for name, flag in found.items() if flag is not None}


def _whole_tokens(store: GGUFStore) -> list[tuple[int, Any]]:
    """Index and token of what is found in text as a whole, before anything is split."""
    tokens = store.metadata.get("tokenizer.ggml.tokens") or ()
    kinds = store.metadata.get("tokenizer.ggml.token_type") or ()
    found = []
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        # Some converters mark the end of a turn as an ordinary token, or as one of the user's.
        ends = kind in (_NORMAL, _USER_DEFINED) and looks_like_an_end(token)
        if ends or kind in _WHOLE:
            found.append((index, _added(token, ends or kind == _CONTROL)))
    return found


def _added(text: str, special: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(text, normalized=False, special=special)
