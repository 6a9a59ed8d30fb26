"""Sizes of GGML's quantised blocks."""

from __future__ import annotations

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


def block_bytes(kind: str) -> int:
    """Bytes of one block of a GGML type."""
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return size


def block_values(kind: str) -> int:
    """Values in one block of a GGML type."""
    values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return values


def stored_bytes(kind: str, values: int) -> int:
    """Bytes of so many values of a GGML type; they must be whole blocks."""
    return values // block_values(kind) * block_bytes(kind)
