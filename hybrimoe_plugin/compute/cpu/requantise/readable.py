"""Which types the CPU's kernels read as they are stored."""

from __future__ import annotations

from hybrimoe_plugin.compute.cpu.ggml import TYPES
from hybrimoe_plugin.compute.cpu.kt_kernel import kernel_types, variant_name

_INACCURATE = frozenset({"IQ4_XS"})
"""Products in these lose 3 to 6 % in the tiles of kt-kernel's ggml."""


def readable_types(backend: str = "ggml") -> frozenset[str]:
    """GGML types for which a backend, `ggml` or `kt`, has kernels on this machine."""
    types = TYPES if backend == "ggml" else kernel_types(variant_name())
    return types - _INACCURATE
