"""The host's home directory is the test run's own, and `import classic` works in this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """kTransformers writes its settings into the user's home while it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def host(_home: None) -> Iterator[object]:
    """The patches in force for one test module."""
    del _home
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    with apply_patches() as applied:
        yield applied
