"""Which release of ktransformers the host is, and what is installed."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

VERSION = "0.2.1.post1"
"""The last release on the package index with the injection framework and `local_chat`."""
SDIST_SHA256 = "079ee36fbefe1280455f6cb2d9afaf840a9fed350acecdcf94f03b113aa94199"
TRANSFORMERS = "4.43.2"
"""What that release pins; the default host needs a much later one, hence an environment of its own.
"""

MADE = ".hybrimoe-ktransformers"
"""File in an environment that `install_ktransformers --venv` made; its first line names the
environment of the default host. Empty while it is unfinished.
"""
_SOURCES = Path(__file__).parents[3]


def fits(transformers: str) -> bool:
    """Whether that release runs with this version of transformers."""
    return transformers.startswith("4.43.")


def how_to_install() -> str:
    """The command that brings it from here: one that exists in this environment."""
    try:
        if fits(metadata.version("transformers")):
            return "hybrimoe install_ktransformers"
    except metadata.PackageNotFoundError:
        return "hybrimoe install_ktransformers"
    if is_checkout():
        return f"make setup-ktransformers, in {_SOURCES}"
    return "hybrimoe install_ktransformers --venv DIR"


def is_checkout() -> bool:
    """Whether this project runs from its sources, where its Makefile is."""
    return (_SOURCES / "scripts" / "setup_ktransformers.py").is_file()


def default_command() -> str:
    """The `hybrimoe` of the default host's environment, as far as it is known here."""
    made = Path(sys.prefix) / MADE
    if made.is_file():
        prefix = made.read_text(encoding="utf-8").partition("\n")[0]
        return str(Path(prefix) / "bin" / "hybrimoe")
    return str(_SOURCES / ".venv" / "bin" / "hybrimoe") if is_checkout() else "hybrimoe"


def installed() -> str | None:
    """The version of the installed ktransformers, None if there is none."""
    try:
        return metadata.version("ktransformers")
    except metadata.PackageNotFoundError:
        return None


def release_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 2, 1) of `0.2.1.post1+cu124`."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def in_range(version: str, low: str, below: str) -> bool:
    """Whether `low <= version < below` by leading numbers; a post-release counts as its release."""
    return release_numbers(low) <= release_numbers(version) < release_numbers(below)
