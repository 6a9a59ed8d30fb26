"""Tokenizers are read from GGUF files, also of architectures that transformers does not load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers.pre_tokenizers import ByteLevel

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.tokenizer import load_tokenizer
from hybrimoe_plugin.weights.gguf_store import GGUFStore

ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = ["<s>", "</s>", *ALPHABET, "Ġt", "he", "Ġthe", "12", "123"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def vocabulary(pre: str) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "1 2", "12 3"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def written(folder: Path, family: str, keys: dict[str, Any]) -> Any:
    """The tokenizer of a file with these keys."""
    size = len(keys["tokenizer.ggml.tokens"])
    path = tiny.write(folder, family, changes={"vocab_size": size}, extra=keys)
    store = GGUFStore.open(path)
    return load_tokenizer(None, store)


def tokenizer_of(folder: Path, family: str, pre: str) -> Any:
    return written(folder, family, vocabulary(pre))


def round_trip(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text).input_ids
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("family", "pre"),
    [
        ("mixtral", "llama-bpe"),
        ("qwen3_moe", "qwen2"),
        ("deepseek_v2", "deepseek-llm"),
        ("deepseek_v3", "deepseek-v3"),
    ],
)
def test_every_family_has_its_tokenizer_and_template(family: str, pre: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, family, pre)
    text = "in the end: 5 Üben"
    assert round_trip(tokenizer, text) == text
    the = TOKENS.index("Ġthe")
    assert the in tokenizer(text).input_ids
    assert tokenizer.eos_token == "</s>"
    assert tokenizer("</s>").input_ids == [1]
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"


def test_deepseek_splits_numbers_as_its_vocabularies_do(tmp_path: Path) -> None:
    older = tokenizer_of(tmp_path, "deepseek_v2", "deepseek-llm")
    newer = tokenizer_of(tmp_path, "deepseek_v3", "deepseek-v3")
    assert older.tokenize("12345") == ["1", "2", "3", "4", "5"]
    assert newer.tokenize("12345") == ["123", "4", "5"]


@pytest.mark.parametrize(
    ("family", "pre"), [("mixtral", "llama-bpe"), ("qwen3_moe", "qwen2"), ("deepseek_v2", "qwen2")]
)
@pytest.mark.parametrize("begins", [True, False])
def test_special_tokens_are_the_file_s(family: str, pre: str, begins: bool, tmp_path: Path) -> None:
    ordinary = [1] * (len(TOKENS) - 3)
    keys = vocabulary(pre)
    keys["tokenizer.ggml.add_bos_token"] = begins
    keys["tokenizer.ggml.token_type"] = [3, 3, *ordinary, 4]
    tokenizer = written(tmp_path, family, keys)
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    ids = tokenizer("he</s>123").input_ids
    first = [0] if begins else []
    assert ids == [*first, TOKENS.index("he"), 1, TOKENS.index("123")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he123"


def test_deepseek_s_own_tokens_keep_their_places(tmp_path: Path) -> None:
    """Their names are not in the alphabet of bytes; looked up as bytes they would get ids past the
    vocabulary.
    """
    named = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", *TOKENS[3:]]
    ordinary = [1] * (len(named) - 3)
    keys = vocabulary("deepseek-v3")
    keys["tokenizer.ggml.tokens"] = named
    keys["tokenizer.ggml.token_type"] = [3, 3, 4, *ordinary]
    keys["tokenizer.ggml.add_bos_token"] = True
    tokenizer = written(tmp_path, "deepseek_v3", keys)
    assert len(tokenizer) == len(named)
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    ids = tokenizer("<｜User｜>the<｜end▁of▁sentence｜>").input_ids
    assert ids == [0, 2, named.index("t"), named.index("he"), 1]
    # What users may write themselves is text; what controls the model is not.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<｜User｜>the"


@pytest.mark.parametrize(
    ("family", "pre", "pieces"),
    [
        ("mixtral", "smollm", ["1", "2", "3"]),
        ("mixtral", "tekken", ["1", "2", "3"]),
        ("mixtral", "gpt-4o", ["123"]),
        ("mixtral", "gpt-2", ["123"]),
        ("qwen3_moe", "deepseek-r1-qwen", ["1", "2", "3"]),
        ("qwen3_moe", "llama-bpe", ["123"]),
        ("deepseek_v2", "deepseek-coder", ["1", "2", "3"]),
        ("deepseek_v3", "kimi-k2", ["123"]),
        ("deepseek_v3", "glm4", ["123"]),
    ],
)
def test_text_is_split_as_the_file_says(
    family: str, pre: str, pieces: list[str], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(tmp_path, family, pre)
    assert tokenizer.tokenize("123") == pieces
    text = "Don't I'LL  x\n\n  y 你好 12 été ```\r\n"
    assert round_trip(tokenizer, text) == text


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_unknown_way_of_splitting_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer\.ggml\.pre is 'made-up'.*give model_path"):
        tokenizer_of(tmp_path, family, "made-up")


def test_a_file_that_says_nothing_is_split_as_usual(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = vocabulary("")
    del keys["tokenizer.ggml.pre"]
    tokenizer = written(tmp_path, "qwen3_moe", keys)
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    assert "'qwen2' is taken" in caplog.text


def test_a_sentencepiece_vocabulary_is_read_from_the_file_alone(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "h", "e", "he", "▁he", "<0x0A>"]
    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -0.5, -0.1, 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 6],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    path = tiny.write(tmp_path, "mixtral", changes={"vocab_size": len(tokens)}, extra=extra)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{")
    tokenizer = load_tokenizer(None, GGUFStore.open(path))
    assert tokenizer("he").input_ids == [1, 7]
    # A blank begins every text, and stays where the text begins with another.
    assert tokenizer(" he").input_ids == [1, 3, 7]
    assert tokenizer.decode([7], skip_special_tokens=True) == "he"


def test_an_endless_sentencepiece_token_is_refused_at_once(tmp_path: Path) -> None:
    tokens = ["<unk>", "a" * 1_000_000]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0],
        "tokenizer.ggml.token_type": [2, 1],
    }
    with pytest.raises(WeightsError, match="a token has 1000000 characters"):
        written(tmp_path, "mixtral", keys)


@pytest.mark.parametrize("pre", ["minimax-m2", "solar-open", "hunyuan-dense", "glm5"])
def test_kinds_of_newer_families_are_known(pre: str, tmp_path: Path) -> None:
    assert round_trip(tokenizer_of(tmp_path, "qwen3_moe", pre), "the 12345").strip() == "the 12345"


def test_an_unreadable_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    broken = {**vocabulary("deepseek-v3"), "tokenizer.ggml.model": "no-such-kind"}
    with pytest.raises(WeightsError, match="give model_path"):
        written(tmp_path, "deepseek_v3", broken)


def test_spaces_that_are_a_sign_of_their_own(tmp_path: Path) -> None:
    """As Gemma 4's files have it; transformers' tokenizer of that vocabulary is the oracle."""
    from transformers import GemmaTokenizer

    letters = [*"abcdehilnotw.", "\u2581", "\n"]
    merged = ["\u2581t", "he", "\u2581the", "\n\n", "\u2581\u2581", "ll", "hell"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", *data, *letters, *merged]
    merges = ["\u2581 t", "h e", "\u2581t he", "\n \n", "\u2581 \u2581", "l l", "he ll"]
    keys = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 6 + [6] * 256 + [1] * (len(letters) + len(merged)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    tokenizer = written(tmp_path, "mixtral", keys)
    right = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    for text in ("the hello  the.\n\n to", " ab", "\u00fc\u4e2d the", "a\n\n\nb"):
        ids = tokenizer(text).input_ids
        assert ids == [2, *right(text, add_special_tokens=False).input_ids]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("<|turn>the").input_ids[:2] == [2, tokens.index("<|turn>")]
