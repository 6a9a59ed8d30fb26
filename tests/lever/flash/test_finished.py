"""Packing onto a finished pack: the same model is kept, another one is replaced on demand only."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from hybrimoe_plugin.errors import FlashError
from lever_ext.flash import writer
from lever_ext.flash.format import ALIGNMENT, header_bytes, parse_header
from lever_ext.packing import pack_model, pack_tokenizer, stored_dtype


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of two models of one shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        directory = tmp_path_factory.mktemp("model")
        LlamaForCausalLM(config).save_pretrained(directory)
        made.append(directory)
    return made[0], made[1]


def test_the_same_model_is_kept(
    models: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = pack_model(tmp_path, models[0])
    before = path.stat()
    assert pack_model(tmp_path, models[0]) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    assert "its weights are kept" in caplog.text and "float16" in caplog.text
    pack_model(tmp_path, models[0], force=True)
    assert path.stat().st_ino != before.st_ino


def test_another_model_is_replaced_on_demand_only(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    path = pack_model(tmp_path, models[0])
    content = path.read_bytes()
    with pytest.raises(FlashError, match=r"another model.*--force"):
        pack_model(tmp_path, models[1])
    with pytest.raises(FlashError, match=r"in float16, asked was float32.*--force"):
        pack_model(tmp_path, models[0], dtype="float32")
    assert path.read_bytes() == content
    pack_model(tmp_path, models[1], dtype="float32", force=True)
    assert stored_dtype(path) == "float32"


def test_a_pack_of_an_earlier_version_is_readable_but_not_replaced_unasked(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    path = pack_model(tmp_path, models[0])
    content = bytearray(path.read_bytes())
    offset, nbytes, _ = parse_header(bytes(content[:ALIGNMENT]), len(content), "here")
    body = json.loads(content[offset : offset + nbytes])
    del body["source"]
    index = json.dumps(body, sort_keys=True).encode()
    assert zlib.crc32(index)
    path.write_bytes(header_bytes(offset, index) + content[ALIGNMENT:offset] + index)
    assert stored_dtype(path) == "float16"
    with pytest.raises(FlashError, match=r"unknown model.*--force"):
        pack_model(tmp_path, models[0])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"a file of another program", id="foreign"),
        pytest.param(b"LEVERPAK" + (2).to_bytes(4, "little") + bytes(5000), id="version 2"),
    ],
)
def test_what_is_no_readable_pack_is_replaced_on_demand_only(
    content: bytes, models: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "target.lever"
    path.write_bytes(content)
    with pytest.raises(FlashError, match="not replaced unasked.*--force"):
        pack_model(tmp_path, models[0])
    assert path.read_bytes() == content
    assert stored_dtype(pack_model(tmp_path, models[0], force=True)) == "float16"


def copied(model: Path, directory: Path, words: str = "") -> Path:
    """A copy of a model; where words are given, with a tokenizer that knows them."""
    if not directory.exists():
        shutil.copytree(model, directory)
    if not words:
        return directory
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words.split())}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=words.split()[0]))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=words)
    made.save_pretrained(str(directory))
    return directory


def test_a_kept_pack_gets_the_tokenizer_that_it_lacks(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    pack, model = tmp_path / "pack", copied(models[0], tmp_path / "model")
    path = pack_model(pack, model)
    before = path.stat().st_ino
    (pack / "generation_config.json").unlink()
    with pytest.raises(FlashError, match="pack the model again"):
        pack_tokenizer(pack)
    pack_model(pack, copied(model, model, "a b"))
    assert sorted(pack_tokenizer(pack).get_vocab()) == ["a", "b"]
    assert (pack / "generation_config.json").exists()
    assert path.stat().st_ino == before


def test_a_pack_never_lies_beside_another_models_tokenizer(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = copied(models[0], tmp_path / "ours", "a b")
    theirs = copied(models[1], tmp_path / "theirs", "c d")
    pack = tmp_path / "pack"
    pack_model(pack, ours)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.os, "replace", kill)
        pack_model(pack, ours, force=True)
    assert sorted(pack_tokenizer(pack).get_vocab()) == ["a", "b"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "sync_directory", kill)  # the pack has its name already
        pack_model(pack, theirs, force=True)
    with pytest.raises(FlashError, match="pack the model again"):
        pack_tokenizer(pack)
    assert not (pack / "chat_template.jinja").exists()
    pack_model(pack, theirs)
    assert sorted(pack_tokenizer(pack).get_vocab()) == ["c", "d"]


def test_a_pack_in_its_models_directory_leaves_the_models_files(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied(models[1], tmp_path / "model", "a b")
    shutil.copy(pack_model(tmp_path / "other", models[0]), directory)
    monkeypatch.setattr(writer, "sync_directory", lambda _: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(FlashError, match="gone"):
        pack_model(directory, directory, force=True)
    assert sorted(pack_tokenizer(directory).get_vocab()) == ["a", "b"]
