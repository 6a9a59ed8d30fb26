"""Tokenizer and chat template, from the model directory or from the GGUF."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import HybriMoEError, WeightsError
from hybrimoe_plugin.families.pre_tokenizers import (
    BYTE_LEVEL,
    MARKED_SPACES,
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

_SPACE = "\u2581"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
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
    try:
        if store.metadata.get("tokenizer.ggml.model") == SENTENCE_PIECE:
            return _corrected(_read_by_transformers(store.paths[0]), store)
        if store.metadata.get("tokenizer.ggml.model") == MARKED_SPACES:
            return _marked_spaces(store)
        return _byte_level(store)
    except HybriMoEError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise WeightsError(
            f"{store.paths[0]}: its tokenizer cannot be read ({type(error).__name__}: {error}); "
            "give model_path, a directory with the model's own tokenizer"
        ) from error


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
    try:
        return AutoTokenizer.from_pretrained(
            str(directory), config=config, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise WeightsError(
            f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {error})"
        ) from error


def _read_by_transformers(path: Path) -> Any:
    """The tokenizer as transformers reads it from a GGUF.

    It reads other files beside the given one too, so it gets a folder with nothing else.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="hybrimoe-") as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        return AutoTokenizer.from_pretrained(
            folder, gguf_file="model.gguf", trust_remote_code=False, local_files_only=True
        )


def _corrected(tokenizer: Any, store: GGUFStore) -> Any:
    """Apply what the file says about special tokens.

    Not every release of transformers reads all of it, or reads it rightly.

    Mutates: `tokenizer`.
    """
    known = tokenizer.get_vocab()
    whole = _whole_tokens(store)
    tokenizer.add_tokens([token for index, token in whole if known.get(token.content) == index])
    special = {}
    for name, text in _special_texts(store).items():
        if text is not None:
            special[name] = _added(text, True)
    tokenizer.add_special_tokens(special)
    for name, flag in _flags(store).items():
        setattr(tokenizer, name, flag)
    return tokenizer


def _byte_level(store: GGUFStore) -> Any:
    """Byte-level BPE out of the file's metadata.

    Not through transformers: releases differ in the architectures that they read, in which kinds of
    splitting they know, and lose the places of special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    kind = store.metadata.get("tokenizer.ggml.model")
    tokens = store.metadata.get("tokenizer.ggml.tokens")
    merges = store.metadata.get("tokenizer.ggml.merges")
    if kind != BYTE_LEVEL or tokens is None or merges is None:
        raise ValueError(
            "SentencePiece, or byte-level BPE with merges, is expected; tokenizer.ggml.model is "
            f"{kind!r}"
        )
    where = str(store.paths[0])
    splits = splits_of(store.metadata.get("tokenizer.ggml.pre"), store.architecture, where)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [_pair(merge) for merge in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=splits.whole_words))
    if splits.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(splits)
    backend.decoder = decoders.ByteLevel()
    return _with_special_tokens(backend, store)


def _marked_spaces(store: GGUFStore) -> Any:
    """BPE over whole texts, whose spaces are a sign of their own, with bytes for unknown letters.

    Raises:
        KeyError: tokens or merges are missing.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = store.metadata["tokenizer.ggml.tokens"]
    pairs = [_pair(merge) for merge in store.metadata["tokenizer.ggml.merges"]]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        pairs,
        unk_token=_special_texts(store)["unk_token"],
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return _with_special_tokens(backend, store)


def _with_special_tokens(backend: Any, store: GGUFStore) -> Any:
    """transformers' tokenizer of one of the `tokenizers` package, with what the file says of it.

    Mutates: `backend`.
    """
    from transformers import PreTrainedTokenizerFast

    backend.add_tokens([token for _, token in _whole_tokens(store)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=store.metadata.get("tokenizer.chat_template"),
        **_special_texts(store),
        **_flags(store),
    )


def _pair(merge: str) -> tuple[str, str]:
    """The two parts of a merge; the first may begin with a blank itself."""
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


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
