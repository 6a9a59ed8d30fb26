"""What a test needs and may not find; each function skips the test, or the module, with
the reason.
"""

from __future__ import annotations

import pytest

from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
from hybrimoe_plugin.compute.cpu.native.kernels import compiled
from hybrimoe_plugin.errors import BackendError


def kt_kernel() -> None:
    """kt-kernel, loaded as the project loads it: a plain import would change how this process
    computes.
    """
    try:
        import_kernel()
    except BackendError as missing:
        pytest.skip(str(missing), allow_module_level=True)


def operations() -> None:
    """The CPU's operations, compiled."""
    if not compiled():
        pytest.skip("the operations are not compiled", allow_module_level=True)
