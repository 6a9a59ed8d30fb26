"""Models whose decode steps are captured, in small buffers and on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from graphed import Loader

from hybrimoe_plugin.decode import layer_buffers


@pytest.fixture
def load_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """Loads injected models whose decoding goes through the given capture."""
    monkeypatch.setattr(layer_buffers, "FIRST_CAPACITY", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    loader = Loader(tmp_path, monkeypatch)
    yield loader
    loader.close()
    torch.set_num_threads(threads)
