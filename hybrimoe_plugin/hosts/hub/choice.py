"""Which files of a repository make up the model that was asked for.

Names and sizes come from a server, which may say anything: they are checked before use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hybrimoe_plugin.errors import ConfigError, WeightsError, did_you_mean
from hybrimoe_plugin.files import human, printable

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_ADDRESS = re.compile(r"^https?://(?:www\.)?(?:huggingface\.co|hf\.co)/")
_PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_SHARD = re.compile(r"^.+-(\d{5})-of-(\d{5})\.safetensors$")
_NO_MODEL = re.compile(r"(?:^|/)[^/]*(?:mmproj|imatrix)[^/]*$", re.IGNORECASE)
"""GGUF files that lie beside models: image encoders, and what quantisers measured."""
_CHECKPOINT = re.compile(
    r"(?!consolidated)[^/]*\.(?:safetensors|safetensors\.index\.json)"
    r"|config\.json|generation_config\.json"
    r"|tokenizer[^/]*|vocab\.(?:json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|[^/]*\.tiktoken|chat_template\.(?:jinja|json)"
)
"""What is read of a checkpoint directory; copies in other forms lie in folders below it."""

_MOST_FILES = 20_000
_MOST_BYTES = 1 << 44
"""Of one file: 16 TiB."""
_MOST_SHOWN = 30


@dataclass(frozen=True)
class Asked:
    """What `ORG/REPO[:WANTED]` names."""

    repository: str
    wanted: str
    """A file, a quantisation, or empty."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its path there, and its size in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Choice:
    """The files to fetch."""

    files: tuple[HubFile, ...]
    is_directory: bool
    """The model is the directory with the files; otherwise it is the first file."""


def parse(text: str) -> Asked:
    """Read the name of a model; the address of its page will do.

    Raises:
        ConfigError: it is no such name.
    """
    repository, _, wanted = _ADDRESS.sub("", text).partition(":")
    repository = repository.rstrip("/")
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ConfigError(
            f"expected ORG/REPO, ORG/REPO:QUANTISATION or ORG/REPO:FILE.gguf, found {text[:200]!r}"
        )
    if repository.endswith((".git", ".gguf")):
        raise ConfigError(
            f"{repository} is no repository's name: those do not end so; a file comes after a "
            "colon, as in ORG/REPO:FILE.gguf"
        )
    return Asked(repository, wanted)


def checked_files(entries: Iterable[tuple[object, object]]) -> list[HubFile]:
    """Files from pairs of name and size that a server sent, in the order of their names.

    Raises:
        WeightsError: there are too many, or one has no plain relative path or no possible size.
    """
    files: dict[str, HubFile] = {}
    for name, size in entries:
        if not isinstance(name, str) or not _is_plain(name):
            raise WeightsError(f"the repository lists a file {str(name)[:80]!r}: no plain path")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= _MOST_BYTES:
            raise WeightsError(
                f"the repository lists {name[:80]} with a size of {str(size)[:40]} bytes; up to "
                f"{human(_MOST_BYTES)} can be true"
            )
        files[name] = HubFile(name, size)
        if len(files) > _MOST_FILES:
            raise WeightsError(f"the repository lists more than {_MOST_FILES} files")
    return [files[name] for name in sorted(files)]


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return (
        0 < len(name) < 1000
        and printable(name) == name
        and not any(part in ("", ".", "..") or len(part) > 250 for part in parts)
        and not set(name) & set('\\:*?"<>|')
    )


def choose(asked: Asked, files: Sequence[HubFile]) -> Choice:
    """The files of the model that is asked for.

    Raises:
        ConfigError: the name fits none or several; the message lists what there is.
        WeightsError: parts of the model are missing in the repository.
    """
    models = _models(files)
    if not models and not asked.wanted:
        return _checkpoint(asked, files)
    found = _fitting(asked.wanted, models)
    if len(found) > 1:
        raise ConfigError(
            f"{asked.repository} has {len(found)} models that fit; name one as in "
            f"{asked.repository}:QUANTISATION or {asked.repository}:FILE.gguf: "
            f"{_listed({key: models[key] for key in found})}"
        )
    if not found:
        there = f"it has {_listed(models)}" if models else "it has no GGUF files"
        raise ConfigError(
            f"{asked.repository} has no model {asked.wanted!r}"
            f"{did_you_mean(asked.wanted, models)}: {there}"
        )
    parts = models[found[0]]
    _check_whole(found[0], parts)
    return Choice(tuple(parts), is_directory=False)


def _models(files: Sequence[HubFile]) -> dict[str, list[HubFile]]:
    """Name of a GGUF model without the number of the part -> its files."""
    models: dict[str, list[HubFile]] = {}
    for file in files:
        if file.name.lower().endswith(".gguf") and not _NO_MODEL.search(file.name):
            part = _PART.match(file.name)
            models.setdefault(f"{part[1]}.gguf" if part else file.name, []).append(file)
    return models


def _fitting(wanted: str, models: dict[str, list[HubFile]]) -> list[str]:
    if not wanted:
        return list(models)
    for key, files in models.items():
        if wanted in (key, *(file.name for file in files)):
            return [key]
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [key for key in models if word.search(key)]
    # `UD-Q4_K_M` is a quantisation of its own; `Q4_K_M` means the plain one where both are there.
    plain = [key for key in found if not re.search(rf"UD-{re.escape(wanted)}", key, re.IGNORECASE)]
    return plain or found


def _check_whole(key: str, parts: Sequence[HubFile]) -> None:
    numbers = [match for match in (_PART.match(file.name) for file in parts) if match]
    if not numbers:
        return
    counts = {int(match[3]) for match in numbers}
    there = {int(match[2]) for match in numbers}
    if len(counts) != 1 or there != set(range(1, len(parts) + 1)) or len(parts) not in counts:
        raise WeightsError(
            f"{key}: the repository has {len(parts)} of {max(counts)} parts of this model"
        )


def _checkpoint(asked: Asked, files: Sequence[HubFile]) -> Choice:
    kept = [file for file in files if _CHECKPOINT.fullmatch(file.name)]
    # Weights last: where they are all there, everything is.
    kept.sort(key=lambda file: (file.name.endswith(".safetensors"), file.name))
    names = {file.name for file in kept}
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return Choice(tuple(kept), is_directory=True)
    raise ConfigError(
        f"{asked.repository} has no GGUF file, and no safetensors files with a config.json: "
        "choose a repository that has"
    )


def is_whole(choice: Choice) -> bool:
    """Whether no shard of a checkpoint is missing; `choose` checks those of a GGUF model."""
    shards = [match for match in (_SHARD.match(file.name) for file in choice.files) if match]
    return all(len(shards) == int(match[2]) for match in shards)


def _listed(models: dict[str, list[HubFile]]) -> str:
    lines = [
        f"{key} ({human(sum(file.nbytes for file in parts))})"
        for key, parts in list(models.items())[:_MOST_SHOWN]
    ]
    more = len(models) - len(lines)
    return ", ".join(lines) + (f" and {more} more" if more else "")
