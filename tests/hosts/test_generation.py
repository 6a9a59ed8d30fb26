"""Answers end and are drawn as the model's files say, for every way to load a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers.pre_tokenizers import ByteLevel

from hybrimoe_plugin import load_model
from hybrimoe_plugin.cli.chat.conversation import Chat, ChatOptions
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers import load_plain_model
from hybrimoe_plugin.hosts.transformers.generation import read_generation
from lever_ext import load_target, pack_model, pack_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|eom_id|>", "</s>"]
TOKENS = [*sorted(ByteLevel.alphabet()), "he", *SPECIAL]
END, TURN, PART, OTHER = (TOKENS.index(token) for token in SPECIAL)
LETTER = TOKENS.index("a")
FAR, FARTHEST = 10**6, 2**32 - 1
"""Ids beyond the vocabulary; the latter is -1 as some converters write it."""


def write(
    folder: Path, family: str = "qwen3_moe", kinds: tuple[int, ...] = (3, 3, 3, 1), **more: Any
) -> Path:
    ordinary = [1] * (len(TOKENS) - len(SPECIAL))
    keys = {
        "model": "gpt2",
        "pre": "deepseek-v3" if "deepseek" in family else "qwen2",
        "tokens": TOKENS,
        "token_type": [*ordinary, *kinds],
        "merges": ["h e"],
        "eos_token_id": END,
        **more,
    }
    extra = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return tiny.write(folder, family, changes={"vocab_size": len(TOKENS)}, extra=extra)


def ends(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "directory"
    tiny.config("qwen3_moe", vocab_size=len(TOKENS)).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def generation(directory: Path, **values: Any) -> None:
    (directory / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_every_end_of_a_file_ends(family: str, tmp_path: Path) -> None:
    path = write(tmp_path, family, eot_token_id=LETTER, eom_token_id=PART)
    model, tokenizer = load_plain_model(None, path)
    assert set(ends(model)) == {END, LETTER, PART, TURN}
    assert model.generation_config.pad_token_id == END
    assert tokenizer.decode([LETTER, TURN], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_ends_of_turns_are_known_by_name(kind: int, tmp_path: Path) -> None:
    """Some converters mark them as ordinary tokens, or as the user's."""
    path = write(tmp_path, kinds=(3, kind, 1, 1))
    model, tokenizer = load_plain_model(None, path)
    assert ends(model) == [END, TURN, PART]
    assert tokenizer("a<|im_end|>").input_ids == [LETTER, TURN]
    assert tokenizer.decode([TURN], skip_special_tokens=True) == ""
    assert tokenizer("</s>").input_ids != [OTHER], "that may be text"


def test_ids_beyond_the_embedding_mean_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, eot_token_id=FAR, bos_token_id=FARTHEST, unknown_token_id=FAR)
    model, tokenizer = load_plain_model(None, path)
    assert max(ends(model)) < len(TOKENS)
    assert tokenizer.bos_token is None
    assert tokenizer.unk_token is None
    assert model.generation_config.bos_token_id != FARTHEST


def test_generation_config_is_taken(directory: Path, tmp_path: Path) -> None:
    said = {
        "do_sample": True,
        "temperature": 1,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "min_p": 0,
    }
    generation(directory, eos_token_id=[TURN, END], max_length=5, transformers_version="4", **said)
    model, tokenizer = load_model(directory, write(tmp_path), cpu_backend="torch", progress=False)
    assert ends(model) == [TURN, END, PART]
    assert {name: getattr(model.generation_config, name) for name in said} == said
    talk = Chat(model, tokenizer, ChatOptions(max_new_tokens=4))
    talk.answer("he")  # whole numbers, as JSON has them, are no errors to transformers' filters
    assert len(talk.messages) == 2
    model.hybrimoe.close()


def test_an_answer_ends_at_the_turn_s_end(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token but the first is one of the ends, so that the second ends the answer."""
    generation(directory, eos_token_id=list(range(len(TOKENS))))
    model, tokenizer = load_plain_model(directory, write(tmp_path), dtype="float32", progress=False)
    options = ChatOptions(max_new_tokens=9, sampling={"do_sample": False})
    Chat(model, tokenizer, options).answer("he")
    assert "eval count:           0 token(s)" in capsys.readouterr().err


@pytest.mark.parametrize("cold", [0, 0.0, 1e-30])
def test_no_temperature_is_the_likeliest_token(
    cold: float, directory: Path, tmp_path: Path
) -> None:
    generation(directory, do_sample=True, temperature=cold)
    model, _ = load_plain_model(directory, write(tmp_path), progress=False)
    assert model.generation_config.do_sample is False


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", -2),
        ("min_p", True),
        ("repetition_penalty", 0),
        ("typical_p", 0),
        ("do_sample", "yes"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [-1]),
        ("pad_token_id", 1.5),
    ],
)
def test_values_out_of_range_are_named(
    name: str, value: Any, directory: Path, tmp_path: Path
) -> None:
    generation(directory, **{name: value})
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} is .*expected"):
        load_model(directory, write(tmp_path), cpu_backend="torch", progress=False)


def test_what_is_not_used_is_said(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generation(directory, custom_generate="someone/recipe", guidance_scale=2.0, top_k=-1)
    model, _ = load_plain_model(directory, write(tmp_path), progress=False)
    assert "not used: custom_generate, guidance_scale" in caplog.text
    assert not hasattr(model.generation_config, "custom_generate")
    assert model.generation_config.top_k == 0


def test_a_pack_keeps_how_its_model_answers(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    tiny.config("llama", vocab_size=len(TOKENS)).save_pretrained(directory)
    generation(directory, eos_token_id=[TURN], do_sample=True, temperature=0.5)
    pack = tmp_path / "pack"
    path = write(tmp_path, "llama", eot_token_id=LETTER)
    pack_model(pack, directory, path, "float32")
    target = load_target(pack, direct=False)
    try:
        target.stop_as(pack_tokenizer(pack))
        config = target.model.generation_config
        assert set(config.eos_token_id) == {TURN, END, PART, LETTER}
        assert config.do_sample is True
        assert config.temperature == 0.5
    finally:
        target.close()


def test_ids_that_say_that_there_is_no_token_are_left_to_the_other_files(tmp_path: Path) -> None:
    values = {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": [], "temperature": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert read_generation(tmp_path) == {"temperature": 0.5}
