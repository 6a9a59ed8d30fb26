"""What the engine sees of the memory that graphs write at every token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrimoe_plugin.device.streams import HostStreams, PendingCopy
from hybrimoe_plugin.engine.view import GraphMemory, Predictions, loads_of_each
from hybrimoe_plugin.policy.step import loads

TYPES = [
    (torch.int64, torch.float32),
    (torch.int32, torch.bfloat16),
    (torch.int16, torch.float16),
    (torch.int64, torch.bfloat16),
    (torch.int32, torch.float32),
]


class Token:
    """Memory of one layer with 4 experts, of which two are chosen."""

    def __init__(self, ids: torch.dtype, floating: torch.dtype) -> None:
        self.hidden = torch.zeros(1, 8)
        self.ids = torch.zeros(1, 2, dtype=ids)
        self.weights = torch.zeros(1, 2, dtype=floating)
        self.scores = torch.zeros(1, 4, dtype=floating)
        self.predicted = [torch.zeros(1, 2, dtype=ids) for _ in range(2)]
        self.memory = GraphMemory(
            [self.hidden, self.ids, self.weights, self.scores], self.predicted
        )

    def write(self, first: int) -> None:
        """What a graph does."""
        self.ids.copy_(torch.tensor([[first, first + 1]]))
        self.weights.fill_(first / 4)
        self.scores.fill_(first / 8)
        for distance, ids in enumerate(self.predicted, 1):
            ids.copy_(torch.tensor([[first + distance, first]]))

    @property
    def predictions(self) -> Predictions:
        return Predictions(PendingCopy(HostStreams(), self.predicted), self.memory.predicted)


@pytest.mark.parametrize(("ids", "floating"), TYPES)
@pytest.mark.parametrize("inference", [False, True])
def test_it_is_what_the_last_token_left(
    ids: torch.dtype, floating: torch.dtype, inference: bool
) -> None:
    with torch.inference_mode(inference):  # as a model is captured, and called later
        token = Token(ids, floating)
    for first in (1, 2):
        with torch.inference_mode(inference):
            token.write(first)
        seen = token.memory.view(token.memory.chosen(), token.predictions)
        hidden, chosen, weights = seen.for_cpu()
        scored = seen.routing.scored
        assert hidden is token.hidden
        assert (chosen.dtype, weights.dtype) == (torch.int64, torch.float32)
        assert scored.scores is not None
        types = scored.ids.dtype, scored.weights.dtype, scored.scores.dtype
        assert types == (np.int64, np.float32, np.float32)
        assert seen.chosen == chosen.tolist()[0] == scored.ids[0].tolist() == [first, first + 1]
        assert weights.tolist() == scored.weights.tolist() == [[first / 4] * 2]
        assert scored.scores.tolist() == [[first / 8] * 4]
        assert seen.loads() == {first: 1, first + 1: 1}
        assert seen.predictions is not None
        found = seen.predictions.arrived()
        assert [item.dtype for item in found] == [np.int64] * 2
        assert [item.tolist()[0] for item in found] == [[first + 1, first], [first + 2, first]]


def test_nothing_is_made_for_a_token_where_types_are_the_hosts() -> None:
    token = Token(torch.int64, torch.float32)
    first = token.memory.view([0, 0], None).routing
    assert token.memory.view([0, 0], None).routing is first
    assert (first.ids, first.weights) == (token.ids, token.weights)
    arrays = first.scored.ids, first.scored.weights, first.scored.scores
    for array, tensor in zip(arrays, (token.ids, token.weights, token.scores), strict=True):
        assert array is not None and np.shares_memory(array, tensor.numpy())


@pytest.mark.parametrize(("ids", "floating"), TYPES)
def test_a_record_stays_as_it_was(ids: torch.dtype, floating: torch.dtype) -> None:
    token = Token(ids, floating)
    token.write(1)
    seen = token.memory.view(token.memory.chosen(), token.predictions)
    record = seen.record(3, token.predictions.arrived())
    token.write(2)
    token.memory.view(token.memory.chosen(), None)
    assert record.layer == 3
    assert record.topk_ids.tolist() == [[1, 2]]
    assert record.topk_weights.tolist() == [[0.25, 0.25]]
    assert record.scores is not None and record.scores.tolist() == [[0.125] * 4]
    assert [item.tolist() for item in record.predicted] == [[[2, 1]], [[3, 1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_that_shows_no_scores(dtype: torch.dtype) -> None:
    """Then caches look at the weights."""
    tensors = [torch.zeros(1, 8), torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]], dtype=dtype)]
    memory = GraphMemory(tensors, [])
    scored = memory.view(memory.chosen(), None).routing.scored
    assert scored.scores is None
    assert scored.weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("tokens", [1, 3])
def test_predicted_loads(tokens: int) -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(6), (tokens, 1)), axis=1)[:, :2]
    assert loads_of_each([ids, ids[::-1]]) == [loads(ids), loads(ids[::-1])]
    assert loads_of_each([]) == []
