"""What to say about a path that leads to no GGUF file: what it is instead, and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from hybrimoe_plugin.errors import did_you_mean

_HUB = re.compile(r"^(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+([\w.-]+/[\w.-]+)(.*)$")
"""The address of a model: its name, and what comes after it."""
_HUB_NAME = re.compile(r"^([\w.-]+/[\w.-]+?)(?::[\w.-]+)?$")
"""A model's name, with a quantisation behind it as Ollama writes it."""
_MOST_ENTRIES = 1000
"""Entries of a folder that are looked at."""
_MOST_NAMES = 3
"""File names in a message."""

CONVERT = (
    "weights are read from GGUF files, or from safetensors files beside their config.json "
    "(--model_path DIR)"
)
_PYTORCH = f"it is a PyTorch checkpoint; {CONVERT}"
_WEB_PAGE = "it is a web page, not the file that the page offers; download that"
_OLD_GGML = "it is of llama.cpp's format before GGUF; download the model anew"

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"{", "it is JSON, as config.json and tokenizer.json; --model_path takes their directory"),
    (b"PK\x03\x04", _PYTORCH),
    (b"\x80", _PYTORCH),
    (b"version https://git-lfs", "it is a pointer of Git LFS to the file; run git lfs pull"),
    (b"<!", _WEB_PAGE),
    (b"<html", _WEB_PAGE),
    (b"tjgg", _OLD_GGML),
    (b"lmgg", _OLD_GGML),
    (b"fmgg", _OLD_GGML),
)
"""First bytes of files that people give for a GGUF file -> what to say."""
_LONGEST_BEGINNING = 64


def about_bytes(data: bytes) -> str:
    """What a file that begins like this is, as the end of a message; empty if unknown."""
    start = bytes(data[:_LONGEST_BEGINNING])
    for beginning, text in _BEGINNINGS:
        if start.startswith(beginning):
            return f": {text}"
    # A safetensors file begins with the length of its JSON header.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return ": it is a safetensors file; --model_path takes its directory, with config.json"
    return ""


def about_missing(path: Path) -> str:
    """What a path to nothing may have been meant for, as the end of a message."""
    hub = _on_hub(path)
    if hub is not None:
        model, file = hub
        return (
            "; if that is a model on the Hugging Face Hub, run hybrimoe pull "
            f"{model}{file} and give the path that it prints"
        )
    if not os.path.isdir(path.parent):
        return f"; there is no directory {path.parent}"
    names = _names(path.parent, lambda name: name.endswith(".gguf"))
    hint = did_you_mean(path.name, names)
    if hint or not names:
        return hint
    return f"; the GGUF files there are {_listed(names)}"


def about_folder(folder: Path) -> str:
    """What a folder without GGUF files holds, as the end of a message; empty if nothing of use."""
    below = _folder_with_files(folder)
    if below is not None:
        return f"; {below} has one: give that"
    others = (".safetensors", ".bin", ".pt", ".pth")
    names = _names(folder, lambda name: name.endswith(others))
    if names:
        return f", but {_listed(names)}; {CONVERT}"
    return ""


def _on_hub(path: Path) -> tuple[str, str] | None:
    """(model, :FILE or :QUANTISATION or nothing) where a path looks like a model on the Hub."""
    text = str(path)  # which has one slash where an address has two
    address = _HUB.match(text)
    if address is not None:
        file = re.search(r"[\w.-]+\.gguf", address[2])
        return address[1], f":{file[0]}" if file else _wanted(address[2])
    name = _HUB_NAME.match(text)
    if name is not None and not text.endswith(".gguf") and not os.path.exists(path.parent):
        return name[1], _wanted(text.removeprefix(name[1]))
    return None


def _wanted(rest: str) -> str:
    """The quantisation behind a model's name, with its colon."""
    return rest if re.fullmatch(r":[\w.-]+", rest) else ""


def _names(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Names of entries of a folder, sorted; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name for entry in islice(entries, _MOST_ENTRIES) if wanted(entry.name)
            )
    except OSError:
        return []


def _folder_with_files(folder: Path) -> Path | None:
    """The first folder below, one step or a Hub cache's two steps down, that has a GGUF file."""
    for start in (folder, folder / "snapshots"):
        for name in _names(start, lambda name: not name.startswith(".")):
            if _names(start / name, lambda inner: inner.endswith(".gguf")):
                return start / name
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{', '.join(names[:_MOST_NAMES])}{more}"
