"""The rotary embedding of a decode step as a matrix that ggml can multiply by."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.attention.rope import Rope, cos_sin
from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.token_attention import Rotating
from hybrimoe_plugin.errors import InputError


class RopeMatrix:
    """The rotation of the running step's position, shared by all layers of a model.

    Rotation is linear, so the rotated unit vectors are the columns of its matrix. For D = 4 in
    halves, with the angles a and b of the position:

            | cos a           -sin a          |
        R = |         cos b           -sin b  |      rotated x = R x
            | sin a            cos a          |
            |         sin b            cos b  |

    Attributes:
        matrix: [D, D] float32. Valid until the next step.
    """

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._unit_vectors = torch.eye(rope.width, dtype=torch.float32, device="cpu")
        self._embeddings: Any = None
        self.matrix = buffer(rope.width, rope.width)
        factors = buffer(rope.width), buffer(rope.width)
        self._rotating = Rotating(*_sources(rope), *factors)

    def build(
        self, graph: Graph | NativeGraph, x: GraphTensor, out: torch.Tensor | None = None
    ) -> GraphTensor:
        """The rotated heads of x [..., D] in a graph.

        Args:
            out: where the result goes; by default into memory of its own.
        """
        if isinstance(graph, Graph):
            return graph.matmul(graph.wrap(self.matrix), x, out, indexed=False)
        return graph.rotate(x, self._rotating, out)

    def set_step(self, embeddings: Any) -> None:
        """Take what the model's rotary module returned.

        It is the same object for every layer of a step, and only the first one has work to do.

        Raises:
            InputError: angles of another shape than one token's.
        """
        if embeddings is self._embeddings:
            return
        self._embeddings = None  # unknown while the matrix is written
        half = self._rope.width // 2
        cos, sin = cos_sin(embeddings, half)
        if cos.shape != (1, 1, 1, half):
            raise InputError(
                f"one token has one position of {half} angles, found {list(cos.shape)}: "
                "position_ids must be [1, 1] for it"
            )
        rotated = self._rope.rotate(self._unit_vectors, cos[0, 0], sin[0, 0])
        self.matrix.copy_(rotated.t())
        first, second, by_first, by_second = self._rotating
        torch.gather(rotated, 0, first[None], out=by_first[None])
        torch.gather(rotated, 0, second[None], out=by_second[None])
        self._embeddings = embeddings


def _sources(rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """[D] int64 each: the two values of a head that each value of the result is made of."""
    half = rope.width // 2
    unit_vectors = torch.eye(rope.width, dtype=torch.float32, device="cpu")
    cos, sin = unit_vectors.new_full((half,), 2.0), unit_vectors.new_full((half,), 3.0)
    rotated = rope.rotate(unit_vectors, cos, sin)  # [D of x, D of the result]
    places = rotated.t().nonzero()[:, 1].view(rope.width, 2)
    return places[:, 0].contiguous(), places[:, 1].contiguous()
