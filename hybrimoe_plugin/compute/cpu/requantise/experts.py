"""A layer's experts in types that the CPU's kernels take: requantised where they are not."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from hybrimoe_plugin.compute.cpu.requantise.requantiser import (
    Requantised,
    Requantiser,
    bytes_in,
    replacement,
)
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

log = logging.getLogger(__name__)


def supported_weights(weights: LayerWeights, types: Container[str]) -> LayerWeights:
    """The same layer with every matrix in one of these types, which the kernels run.

    Raises:
        BackendError: weights that no such type can hold.
    """
    requantiser: Requantiser | None = None
    matrices: dict[str, Matrix] = {}
    spec_fields: dict[str, Any] = {}
    for part, made in _replaced(weights, types):
        log.info("layer %d: %s", weights.layer, made.text())
        requantiser = requantiser or Requantiser()
        matrix = _matrix(getattr(weights, part), made, requantiser)
        matrices[part] = matrix
        spec_fields[f"{part}_type"] = made.target
        spec_fields[f"{part}_bytes"] = matrix.experts[0].size
    if not matrices:
        return weights
    spec = replace(weights.spec, **spec_fields)
    return replace(weights, spec=spec, **matrices)  # type: ignore[arg-type]


def replaced(weights: LayerWeights, types: Container[str]) -> list[Requantised]:
    """What `supported_weights` makes of a layer for kernels of these types."""
    return [made for _, made in _replaced(weights, types)]


def _replaced(weights: LayerWeights, types: Container[str]) -> Iterator[tuple[str, Requantised]]:
    """(gate, up or down; what becomes of it) of each matrix without a kernel."""
    spec = weights.spec
    for part in ("gate", "up", "down"):
        matrix: Matrix = getattr(weights, part)
        if matrix.type_name in types:
            continue
        target = replacement(matrix.type_name, types)
        yield (
            part,
            Requantised(
                matrix.type_name,
                target,
                (f"ffn_{part}_exps of layer {weights.layer}",),
                sum(expert.size for expert in matrix.experts),
                bytes_in(target, (spec.experts, spec.intermediate, spec.hidden)),
            ),
        )


def _matrix(matrix: Matrix, made: Requantised, requantiser: Requantiser) -> Matrix:
    """All experts of a projection in the new type, in one piece of memory."""
    stacked = np.empty(made.nbytes, np.uint8)
    experts = tuple(stacked.reshape(len(matrix.experts), -1))
    for target, stored in zip(experts, matrix.experts, strict=True):
        requantiser.convert_into(target, stored, made.type_name, made.target)
    return Matrix(made.target, experts, stacked)
