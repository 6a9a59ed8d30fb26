"""Which types the CPU's kernels read as they are stored."""

from __future__ import annotations

from collections.abc import Container

from hybrimoe_plugin.compute.cpu.ggml import TYPES, Ggml
from hybrimoe_plugin.compute.cpu.kt_kernel import kernel_types, variant_name
from hybrimoe_plugin.errors import BackendError


def readable_types(backend: str = "ggml") -> Container[str]:
    """GGML types for which a backend, `ggml` or `kt`, has kernels that are right on this machine.

    Without kt-kernel they are those that ggml is known to have.
    """
    if backend == "kt":
        return kernel_types(variant_name())
    try:
        return _Tried(Ggml())
    except BackendError:
        return TYPES


class _Tried:
    """Types whose kernels give the right values; each is tried when it is first asked for."""

    def __init__(self, ggml: Ggml) -> None:
        self._ggml = ggml

    def __contains__(self, type_name: object) -> bool:
        return isinstance(type_name, str) and self._ggml.computes(type_name)
