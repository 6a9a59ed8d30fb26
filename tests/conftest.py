"""Shared set-up: small examples, one torch thread, a cache directory of the test run's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch reads it: tests run side by side, and threads that wait for one another on the same
# cores take a hundred times as long for tiny operations.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

# `import tiny` in every test folder.
for folder in ("fakes", "models", "running", "serving"):
    sys.path.insert(0, str(Path(__file__).parent / "helpers" / folder))

# Triton decides when it is first imported whether kernels are interpreted, and libraries import it
# early.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Slow examples are the machine's doing where many tests share two cores.
settings.register_profile(
    "quick", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles are measured once per test run; a demo model that the user already has is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRIMOE_PROFILES", str(tmp_path_factory.getbasetemp() / "profiles"))
        patch.setenv("HYBRIMOE_BUSY", "keep")  # two test processes on two cores are never quiet
        yield
