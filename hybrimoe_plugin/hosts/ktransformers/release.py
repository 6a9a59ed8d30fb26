"""Which release of ktransformers the host is, and what is installed."""

from __future__ import annotations

import re
from importlib import metadata

VERSION = "0.2.1.post1"
"""The last release on the package index with the injection framework and `local_chat`."""
SDIST_SHA256 = "079ee36fbefe1280455f6cb2d9afaf840a9fed350acecdcf94f03b113aa94199"
TRANSFORMERS = "4.43.2"
"""What that release pins; the default host needs a much later one, hence an environment of its own.
"""


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
