"""Packing onto a finished pack: the same model is kept, another one is replaced on demand only."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch

from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.format import ALIGNMENT, header_bytes, parse_header
from lever_ext.packing import pack_model, stored_dtype


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
    assert "nothing to do" in caplog.text and "float16" in caplog.text
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


def test_what_is_no_pack_is_packed_again(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "target.lever").write_bytes(b"LEVERPAK" + bytes(5000))
    assert stored_dtype(pack_model(tmp_path, models[0])) == "float16"
