"""Whatever a file states of its tokenizer, it is read or refused with a typed error."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers import tokenizer as reading
from hybrimoe_plugin.hosts.transformers.tokenizer import directory_tokenizer, load_tokenizer

KEY = "tokenizer.ggml."
LETTERS = [*sorted(ByteLevel.alphabet()), "he", "the"]
BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
WORDS = ["▁", "t", "h", "e", "he", "the", "▁the"]
COMMON: dict[str, Any] = {
    **{f"{KEY}{name}_token_id": 1 for name in ("bos", "eos", "unknown", "padding")},
    f"{KEY}add_bos_token": True,
    f"{KEY}add_eos_token": False,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
PIECES: dict[str, Any] = {
    **COMMON,
    f"{KEY}tokens": [*BYTES, *WORDS],
    f"{KEY}token_type": [2, 3, 3, *[6] * 256, *[1] * len(WORDS)],
}
FILES: dict[str, dict[str, Any]] = {
    "byte level": {
        **COMMON,
        f"{KEY}model": "gpt2",
        f"{KEY}pre": "llama-bpe",
        f"{KEY}tokens": ["<unk>", "<s>", "</s>", *LETTERS],
        f"{KEY}token_type": [2, 3, 3, *[1] * len(LETTERS)],
        f"{KEY}merges": ["h e", "t he"],
    },
    "sentence piece": {
        **PIECES,
        f"{KEY}model": "llama",
        f"{KEY}scores": [0.0] * 259 + [-float(number) for number in range(len(WORDS))],
        f"{KEY}add_space_prefix": True,
    },
    "gemma": {**PIECES, f"{KEY}model": "gemma4", f"{KEY}merges": ["h e", "t he", "▁ the"]},
}
VALUES: tuple[Any, ...] = (
    *(None, 0, 1, -1, 2**40, 1.5, math.nan, "", "x", " ", "the", "\0", True, False),
    *([], [1], ["a"], ["a", "a"], [[1]], [None] * 3, ["the zz"], [" x"], ["x "], ["a b c"]),
    *([value] * 266 for value in (math.nan, 0, -1, 4, 2**40, "a", "", True)),
    *(["t", "h", "e"], ["t h"] * 3, ["h t"], ["\ud800"], ["a" * 2000]),
)


def read(metadata: dict[str, Any]) -> Any:
    store: Any = SimpleNamespace(metadata=metadata, paths=["F"], architecture="llama")
    return load_tokenizer(None, store)


@pytest.mark.parametrize("kind", FILES)
def test_any_value_of_any_key(kind: str) -> None:
    sound = FILES[kind]
    assert read(sound)("the").input_ids[-1] in range(len(sound[f"{KEY}tokens"]))
    for key, old in sound.items():
        cut = [old[:-1], old[:3], old * 2] if isinstance(old, list) else []
        for value in (*VALUES, *cut):
            changed = {**sound, key: value}
            if value is None:
                del changed[key]
            try:
                found = read(changed)
            except WeightsError:
                continue
            if found is not None:
                ids = found("the h\0\n").input_ids
                assert all(0 <= each < len(changed[f"{KEY}tokens"]) for each in ids)
                found.decode(ids)


@pytest.mark.parametrize("kind", FILES)
def test_a_token_with_two_ids_is_refused(kind: str) -> None:
    """One of the ids would be decoded to nothing."""
    sound = FILES[kind]
    tokens = [*sound[f"{KEY}tokens"], "the"]
    more = {f"{KEY}tokens": tokens, f"{KEY}token_type": [*sound[f"{KEY}token_type"], 1]}
    if f"{KEY}scores" in sound:
        more[f"{KEY}scores"] = [*sound[f"{KEY}scores"], 0.0]
    with pytest.raises(WeightsError, match=rf"and {len(tokens) - 1} are both 'the'"):
        read({**sound, **more})


def test_unused_ids_may_have_no_text() -> None:
    sound = FILES["byte level"]
    tokens = [*sound[f"{KEY}tokens"], "", ""]
    found = read({**sound, f"{KEY}tokens": tokens})
    assert found.decode([len(tokens) - 1, len(tokens) - 2]) == ""


def test_merges_that_make_a_token_longer_than_all_are_refused() -> None:
    """tokenizers panics on them, which is not an Exception."""
    sound = FILES["gemma"]
    changed = {f"{KEY}tokens": ["t", "h", "e"], f"{KEY}token_type": [1] * 3}
    with pytest.raises(WeightsError, match="merge of 'h' and 'e' names no tokens"):
        read({**sound, **changed})


def test_a_panic_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> Any:
        raise PanicException("out of range")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(WeightsError, match="PanicException: out of range"):
        directory_tokenizer(tmp_path)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "check_tokenizer_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        directory_tokenizer(tmp_path)
