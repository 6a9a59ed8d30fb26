"""Tiny models on flash: two to four layers, distinct random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lever.helpers import (
    FAMILIES,
    pack_model,
    tiny_model,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and threads that wait for a busy core cost
    milliseconds a call.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plain_models() -> dict[str, Any]:
    return {family: tiny_model(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def packs(
    plain_models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return {
        family: pack_model(model, family, tmp_path_factory.mktemp(family))
        for family, model in plain_models.items()
    }
