"""ggml graphs on the caller's own threads: the C library that kt-kernel carries.

Modules in this package import each other directly; these are the names for everybody else.
"""

from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.kernel_speed import KernelSpeed
from hybrimoe_plugin.compute.cpu.ggml.library import Ggml
from hybrimoe_plugin.compute.cpu.ggml.tensor import (
    TYPES,
    GraphTensor,
    buffer,
    check_stored,
    norm_epsilon_fits,
)

__all__ = [
    "TYPES",
    "Ggml",
    "Graph",
    "GraphTensor",
    "KernelSpeed",
    "buffer",
    "check_stored",
    "norm_epsilon_fits",
]
