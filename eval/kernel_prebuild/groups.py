"""What is compiled, most valuable first: where a limit of time or room cuts, the end is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from eval.kernel_cases.cases import (
    Case,
    LinearCase,
    RepackCase,
    candidate_cases,
    cases,
    linear_cases,
    repack_cases,
)
from eval.kernel_cases.shapes import MODEL_SHAPES, TYPE_SHAPES, Shape
from hybrimoe_plugin.compute.gpu.kernels.formats.description import INTEGERS


class Int8Case(NamedTuple):
    """One token's decode with int8 activations, and what proves it (the check's stage `int8`)."""

    shape: Shape

    @property
    def name(self) -> str:
        """The case in words."""
        return f"int8, {self.shape.name} {'/'.join(self.shape.kinds)}"


AnyCase = Case | LinearCase | RepackCase | Int8Case

TINY = Shape("tiny model", ("Q8_0", "Q8_0", "Q8_0"), 64, 256, 8, 2, rounded_routing=True)
"""The check's tiny model that runs on these kernels (`eval.gpu_check.stages.graphs`)."""
TINY_LINEARS = ((128, 64), (64, 64), (64, 128))
"""(rows, columns) of its dense linears."""
PROMPTS = (1, 20, 40, 96, 256)
"""Tokens of prompts, one for every size of tile."""


class Groups:
    """Cases by name, in the order in which their groups were begun."""

    def __init__(self) -> None:
        self.cases: dict[str, list[AnyCase]] = {}

    def add(self, name: str, *cases: AnyCase) -> None:
        """Append cases to a group, which is begun if it is new."""
        self.cases.setdefault(name, []).extend(cases)

    def add_experts(self, kind: str, case: Case) -> None:
        """Into the group of this kind and the case's shape."""
        self.add(f"{kind}, {case.shape.name} {'/'.join(case.shape.kinds)}", case)

    def add_tuning(self, shape: Shape, calls: Sequence[torch.dtype]) -> None:
        """Add tiles that tuning tries before the first token, and calls in those it may choose.

        Tuning's own routing weights are float32.

        Args:
            calls: dtypes of states in calls after tuning that differ from tuning's own.
        """
        for case in candidate_cases([shape]):
            self.add_experts("tuning", case)
            for dtype in calls:
                self.add_experts("tuned", Case(shape, 1, dtype, case.blocks))


def wanted() -> list[tuple[str, list[AnyCase]]]:
    """(name, cases) of everything that the check calls, in the order of its stages."""
    qwen, padded, mixtral = MODEL_SHAPES[:2], MODEL_SHAPES[5:7], MODEL_SHAPES[7:9]
    recorded = [shape._replace(name=f"{shape.name}, top 6 as recorded", top_k=6) for shape in qwen]
    groups = Groups()
    for case in cases(interpreted=False):
        groups.add_experts("experts", case)
    for linear in linear_cases():
        groups.add(f"linears, {linear.model}", linear)
    groups.add("repacking", *repack_cases())
    for shape in (*recorded, *qwen, *padded, *mixtral, *TYPE_SHAPES):
        if set(shape.kinds) <= set(INTEGERS):
            int8 = Int8Case(shape)
            groups.add(int8.name, int8)
    for shape in (*recorded, *padded, *mixtral):
        for tokens in PROMPTS:
            groups.add_experts("prompts", Case(shape, tokens))
    for shape in (*recorded, *qwen):
        groups.add_tuning(shape, (torch.bfloat16,))
    for shape in (*padded, *mixtral):
        # These routers' weights are float32 as well: no call differs from tuning's.
        groups.add_tuning(shape, ())
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 12):
            groups.add_experts("tiny model", Case(TINY, tokens, dtype))
            for rows, columns in TINY_LINEARS:
                linear = LinearCase("tiny model", "Q8_0", rows, columns, tokens, dtype)
                groups.add("linears, tiny model", linear)
    groups.add_tuning(TINY, (torch.bfloat16, torch.float32))
    return list(groups.cases.items())
