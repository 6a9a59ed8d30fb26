"""Random matrices of any GGML type."""

from __future__ import annotations

from hybrimoe_plugin.compute.cpu.ggml.random_matrix import random_matrix as random_stack
from hybrimoe_plugin.weights.layer_weights import Matrix
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


def random_matrix(type_name: str, rows: int, columns: int, seed: int = 0) -> QuantizedMatrix:
    """Random values, or random codes with small scales."""
    return random_stack(type_name, (rows, columns), seed)


def random_experts(type_name: str, shape: tuple[int, int, int], seed: int = 0) -> Matrix:
    """The same for all experts of a projection."""
    stacked = random_stack(type_name, shape, seed).data
    return Matrix(type_name, tuple(stacked.reshape(shape[0], -1)), stacked)
