"""A step that is cut off while a sequence takes a layer's buffers harms no other sequence."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from graphed import Loader, Sequence, greedy
from replayed import Replayed

from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer
from hybrimoe_plugin.decode.cuda_layer import PROOFS


def test_an_interrupted_move_leaves_the_others_alone(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence lies in a layer's buffers; the step of another one is cut off while it takes its
    place.
    """
    model, steps = load_captured("mixtral", Replayed()), PROOFS + 5
    wanted = [greedy(model, tiny.tokens(7, seed), steps) for seed in range(3)]
    for name, after in (("leave", False), ("_grow", True), ("_show", False), ("move", True)):
        first, second, third = (Sequence(model, seed) for seed in range(3))
        for _ in range(PROOFS + 2):
            first.step()
        second.step()
        real = getattr(GrowingLayer, name)

        def stopped(*args: Any) -> None:
            if after:  # noqa: B023
                real(*args)  # noqa: B023
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(GrowingLayer, name, stopped)
            second.step()
        for sequence in (third, first):
            while len(sequence.tokens) < steps:
                sequence.step()
        assert [first.tokens, third.tokens] == [wanted[0], wanted[2]], name
