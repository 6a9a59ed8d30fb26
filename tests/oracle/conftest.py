"""What llama.cpp ships: `make oracle` fetches it, other test runs leave these tests out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder with llama.cpp's converter, vocabularies and templates."""
    folder = os.environ.get("HYBRIMOE_LLAMA_CPP")
    if folder is None:
        pytest.skip("`make oracle` fetches llama.cpp's converter and runs this")
    return Path(folder)
