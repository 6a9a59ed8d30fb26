"""What newcomers give for a GGUF file is recognised, and the message says what to do instead."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_store import GGUFStore


def complaint(path: Path | str) -> str:
    with pytest.raises(WeightsError) as caught:
        GGUFStore.open(path)
    text = str(caught.value)
    assert text.startswith(str(Path(path)))
    return text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model": 1}', "it is JSON, as config.json and tokenizer.json"),
        (struct.pack("<Q", 40) + b'{"__metadata__":{}}', "safetensors file; --model_path takes"),
        (b"PK\x03\x04\x00\x00", "it is a PyTorch checkpoint; weights are read from GGUF"),
        (b"\x80\x02\x8a\n", "it is a PyTorch checkpoint"),
        (b"<!doctype html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"tjgg\x03\x00\x00\x00", "llama.cpp's format before GGUF"),
    ],
)
def test_other_kinds_of_files_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    text = complaint(path)
    assert "not a GGUF file" in text and said in text


@pytest.mark.parametrize("content", [b"abc", b"{", b"\x00" * 9, b"\xa6\n\xf1\x848\xe9x"])
def test_unknown_files_are_refused_all_the_same(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "not a GGUF file" in complaint(path)


@pytest.mark.parametrize(
    ("typed", "download"),
    [
        ("Qwen/Qwen3-30B-A3B-GGUF", "Qwen/Qwen3-30B-A3B-GGUF and"),
        ("org/name:Q4_K_M", "org/name:Q4_K_M and"),
        ("https://huggingface.co/org/name", "org/name and"),
        ("https://huggingface.co/org/name/resolve/main/a-Q4.gguf?download=true", "org/name:a-Q4."),
        ("hf.co/org/name:Q4_K_M", "org/name:Q4_K_M and"),
    ],
)
def test_names_of_models_on_the_hub_say_how_to_fetch_them(
    typed: str, download: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = complaint(typed)
    assert f"a model on the Hugging Face Hub, run hybrimoe pull {download}" in text


def test_a_mistyped_path_names_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mixtral-q4.gguf", "other.gguf", "zzz.gguf", "zzzz.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert complaint(tmp_path / "mixtral_q4.ggfu").endswith("; did you mean mixtral-q4.gguf?")
    listed = "the GGUF files there are mixtral-q4.gguf, other.gguf, zzz.gguf and 1 more"
    assert complaint(tmp_path / "qwen3").endswith(listed)
    assert complaint("modls/mixtral.gguf").endswith("; there is no directory modls")
    # A path of two parts whose folder is there is no name on the Hub.
    (tmp_path / "empty").mkdir()
    assert complaint("empty/mixtral").endswith("(No such file or directory)")


def test_folders_without_gguf_say_what_they_hold(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"model-{index}.safetensors").write_bytes(b"")
    text = complaint(tmp_path)
    assert "but model-0.safetensors, model-1.safetensors, model-2.safetensors and 1 more" in text
    assert "safetensors files beside their config.json" in text
    inner = tmp_path / "snapshots" / "abc"
    inner.mkdir(parents=True)
    (inner / "model.gguf").write_bytes(b"")
    assert f"{inner} has one: give that" in complaint(tmp_path)


def test_names_that_no_file_can_have_are_typed_errors(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5000, "\udcff/\udcfe", "[/a:"):
        assert complaint(tmp_path / name)
        assert complaint(name)
