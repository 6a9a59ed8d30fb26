"""Comparing a replayed step with the same step run eagerly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.compute.attention.kv_cache import Buffers
from hybrimoe_plugin.decode.capture import GraphBreak, LayerGraphs

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative RMS difference from the eager twin that is still rounding.

Kernels differ, and so does the order of sums.
"""

UNDECIDED = 8
"""Consecutive steps on which two ways to compute may choose other experts, by a near tie.

Such a step proves nothing.
"""

HALF_TOLERANCE = 0.03
"""The same for 16-bit types: the layer's own rounding is 0.003 to 0.01 there."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""(replayed, eager)."""


class ExpertsCall(NamedTuple):
    """The call of the experts in the eager step."""

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Hidden states, ids and weights."""
    output: torch.Tensor
    scores: torch.Tensor | None


class EagerStep(NamedTuple):
    """A decode step as the eager twin has run it."""

    hidden: torch.Tensor
    """The layer's input."""
    output: torch.Tensor
    experts_call: ExpertsCall | None
    held: int
    """Tokens that the cache held before the step; the step's token is the entry of this number."""


class Difference(NamedTuple):
    """How far a replay is from its eager twin."""

    error: float
    """The largest relative RMS difference of what the two leave."""
    same_choice: bool
    """Whether both chose the same experts.

    Where two experts are all but tied either may be chosen; weights cannot be compared then.
    """


def difference(graphs: LayerGraphs, eager: EagerStep, saved: Buffers) -> Difference:
    """Replay a step that the eager twin has just run, and compare what the two leave.

    The replay gets the experts' output of the eager step. It must write the step's cache entries
    anew and leave the others alone. Look-ahead is left out: its predictions are only hints.

    Args:
        saved: copies of the KV cache as the eager step left it.

    Mutates: the graphs' KV buffers.
    """
    restore(graphs.buffers, saved)
    for buffer in graphs.buffers:
        buffer.narrow(2, eager.held, 1).zero_()
    call = eager.experts_call
    experts_output = eager.hidden[:, 0] if call is None else call.output
    output = graphs.run(eager.hidden, lambda _graph_break: experts_output)

    pairs: list[Pair] = [(output, eager.output)]
    pairs += zip(graphs.buffers, saved, strict=True)
    same_choice = True
    graph_break = graphs.graph_break
    if call is not None and graph_break is not None:
        same_choice, routing = _routing_pairs(graph_break, call)
        pairs += routing
    error = max(relative_error(found, right) for found, right in pairs if right.numel())
    return Difference(error, same_choice)


def restore(buffers: Buffers, saved: Sequence[torch.Tensor]) -> None:
    """Mutates: `buffers`."""
    for buffer, right in zip(buffers, saved, strict=True):
        buffer.copy_(right)


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, HALF_TOLERANCE)


def _routing_pairs(graph_break: GraphBreak, call: ExpertsCall) -> tuple[bool, list[Pair]]:
    """(whether both chose the same experts, what can be compared of the routing).

    The replay's is taken as it arrives on the host, so that the copies are compared too.
    """
    states, ids, weights, *scores = graph_break.needed().wait()
    right_states, right_ids, right_weights = (part.cpu() for part in call.inputs)
    pairs = [(states, right_states)]
    # Sorted: of two experts that are all but tied either may come first.
    same_choice = torch.equal(_sorted(ids), _sorted(right_ids))
    if same_choice:
        pairs.append((_sorted(weights.float()), _sorted(right_weights.float())))
    if call.scores is not None:
        right_scores = call.scores.cpu()
        pairs += [(found, right_scores) for found in scores]
    return same_choice, pairs


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative RMS error; infinite where a value is NaN."""
    right = right.float()
    distance = (found.float() - right).norm()
    size = right.norm().clamp_min(1e-20)
    error = float(distance / size)
    return math.inf if math.isnan(error) else error


def _sorted(values: torch.Tensor) -> torch.Tensor:
    return values.sort(dim=-1).values
