from __future__ import annotations

from typing import Any

import pytest
from chained import answer, links_of, proven
from graphed import Loader
from late_device import late_device


@pytest.fixture
def late(load_captured: Loader, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model on a late device whose chain has proved right and always runs ahead."""
    with late_device(monkeypatch, 3) as capture:
        model = load_captured("mixtral", capture, cache_ratio=0.5)
        for link in links_of(model):
            link.sure = 0.0
        answer(model)
        assert proven(model)
        yield model, capture
