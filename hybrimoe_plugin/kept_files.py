"""What the program keeps in its cache folders: which files are its own, and removing them.

Needs the standard library only, so that a checkout whose environments are gone can still clear up.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrimoe_plugin.cache_folder import folders

# Names exactly as the builders give them: the cache folder may hold files of the user's too.
_FORM = "(mixtral|qwen2moe)"
_DEMO = rf"SmolLM2-135M-{_FORM}-v\d+-Q8_0"
_RANDOM = "[a-z0-9_]{8}"
"""What `tempfile` puts into names."""
_CLASSIC = rf"demo/classic-{_DEMO}-tokenizers-\d+\.\d+(-{_RANDOM})?"
_SYNTHETIC = r"[a-z0-9.-]+-\d+-layers(-\d+-experts)?-(Q4_K_M|Q8_0|Q4_0)-v\d+"
_PACK = f"lever/(dense|narrow-fp32|{_FORM})"
_TEXTS = r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|generation_config)\.json"
_MEASURED = rf"[0-9a-f]{{20}}\.json({_RANDOM})?"
"""Named by a digest; an interrupted write leaves more letters behind the name."""
_PART = rf"tmp{_RANDOM}\.part"
"""Left by a build that was killed."""
_TRITON = "hybrimoe-triton/[A-Z2-7]{52}"
"""Triton names its folders by digests."""


@dataclass(frozen=True)
class Kind:
    """Files of one purpose."""

    name: str
    purpose: str
    patterns: tuple[str, ...]
    """Of paths below the cache folder. The first names the file without which the program takes the
    others for missing: it is removed first, so that an interrupted removal leaves nothing half
    usable.
    """


KINDS = (
    Kind(
        "demo",
        "demo models, and their directories for classic kTransformers",
        (
            rf"demo/{_DEMO}\.gguf|{_CLASSIC}/{_DEMO}\.gguf",
            rf"demo/{_DEMO}\.(sha256|checked)({_RANDOM})?|{_CLASSIC}/({_TEXTS}|config\.json)|demo/{_PART}",
        ),
    ),
    Kind(
        "synthetic",
        "models for benchmarks, with real shapes and random weights",
        (rf"synthetic/({_SYNTHETIC}\.gguf|{_PART})",),
    ),
    Kind(
        "packs",
        "demo models packed for flash",
        (
            rf"{_PACK}/target\.lever",
            rf"{_PACK}/({_TEXTS}|chat_template\.jinja)",
        ),
    ),
    Kind("profiles", "costs measured on this machine", (rf"profiles/{_MEASURED}",)),
    Kind(
        "kernels",
        "GPU kernels: measured tile sizes and, where Triton's own folder cannot be written, code",
        (rf"kernels/{_MEASURED}", rf"{_TRITON}/.+"),
    ),
    Kind("history", "what was typed in the chat", ("chat_history",)),
)

_FOLDERS = frozenset({"demo", "synthetic", "lever", "profiles", "kernels", "hybrimoe-triton"})


@dataclass(frozen=True)
class Kept:
    """One of the program's own files, or a symbolic link that it made."""

    kind: str
    root: Path
    path: Path
    """Below `root`."""
    nbytes: int
    modified: float
    """Seconds since 1970."""
    rank: int
    """Which of the kind's patterns it matches."""

    @property
    def group(self) -> str:
        """What it is a part of: a model and its checksum are one, and so are all profiles."""
        if self.kind in ("profiles", "kernels", "history"):
            return self.kind
        second = self.path.parts[1]
        return second if len(self.path.parts) > 2 else second.partition(".")[0]


def kept_files(kinds: Collection[str] = ()) -> list[Kept]:
    """The program's own files in its cache folders, of all kinds or of these.

    Symbolic links inside the folders are not followed.
    """
    chosen = [kind for kind in KINDS if kind.name in kinds or not kinds]
    return [file for root in folders() for file in _below(root, chosen)]


def _below(root: Path, kinds: Sequence[Kind]) -> Iterator[Kept]:
    for folder, inner, names in os.walk(root):
        # The cache folder may be a large one of the user's, such as the home directory.
        inner[:] = sorted(_FOLDERS.intersection(inner)) if folder == str(root) else sorted(inner)
        for name in sorted(names):
            path = Path(folder, name)
            found = _classified(path.relative_to(root), kinds)
            if found is None:
                continue
            kind, rank = found
            with contextlib.suppress(OSError):  # somebody else has removed it
                state = path.lstat()
                yield Kept(kind, root, path.relative_to(root), state.st_size, state.st_mtime, rank)


def _classified(path: Path, kinds: Iterable[Kind]) -> tuple[str, int] | None:
    """The kind of a file and the number of its pattern; None for a file that is not ours."""
    for kind in kinds:
        for rank, pattern in enumerate(kind.patterns):
            if re.fullmatch(pattern, path.as_posix()):
                return kind.name, rank
    return None


def remove(files: Iterable[Kept]) -> list[OSError]:
    """Remove files, and the folders that this leaves empty.

    Returns:
        why some could not be removed.
    """
    ordered = sorted(files, key=lambda file: file.rank)
    failures = []
    for file in ordered:
        try:
            (file.root / file.path).unlink(missing_ok=True)
        except OSError as error:
            failures.append(error)
    emptied = {file.root / parent for file in ordered for parent in list(file.path.parents)[:-1]}
    for folder in sorted(emptied, reverse=True):  # inner ones first
        with contextlib.suppress(OSError):
            folder.rmdir()
    return failures
