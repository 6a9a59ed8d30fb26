"""Every test here runs torch on one thread."""

from __future__ import annotations

import needs
import pytest
from one_thread import one_torch_thread

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.native.choice import kernels_of
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels

__all__ = ["one_torch_thread"]


@pytest.fixture(scope="session")
def ggml() -> Ggml:
    needs.kt_kernel()
    needs.operations()
    return Ggml()


@pytest.fixture(scope="session")
def kernels(ggml: Ggml) -> Kernels:
    found = kernels_of(ggml)
    assert found is not None
    return found
