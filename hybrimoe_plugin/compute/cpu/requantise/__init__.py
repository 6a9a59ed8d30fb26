"""Weights of types without a kernel, written in a type that has one."""

from hybrimoe_plugin.compute.cpu.requantise.experts import replaced, supported_weights
from hybrimoe_plugin.compute.cpu.requantise.readable import readable_types
from hybrimoe_plugin.compute.cpu.requantise.requantiser import (
    Requantised,
    Requantiser,
    by_type,
    bytes_in,
    replacement,
)

__all__ = [
    "Requantised",
    "Requantiser",
    "by_type",
    "bytes_in",
    "readable_types",
    "replaced",
    "replacement",
    "supported_weights",
]
