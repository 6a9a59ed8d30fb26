"""Graphs are used only after they gave what the eager layer gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from graphed import Loader, greedy, layers_of
from replayed import Replayed

from hybrimoe_plugin.compute.attention.kv_cache import FixedCache
from hybrimoe_plugin.decode.cuda_layer import PROOFS, UNDECIDED


def frozen_position(
    cache: FixedCache, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    """Writes where the capturing step's token belongs, by a number: the next step's goes
    there too.
    """
    position = int(cache.buffers[0].shape[2]) - 10
    cache.buffers[0].narrow(2, position, 1).copy_(key)
    cache.buffers[1].narrow(2, position, 1).copy_(value)
    return cache.buffers


def read_position(
    cache: FixedCache, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    cache.buffers[0].narrow(2, int(cache.position), 1).copy_(key)
    return cache.buffers


def no_replay(number: int, _done: Any, replay: Callable[[], None]) -> Callable[[], None]:
    return (lambda: None) if number == 4 else replay


def late_replay(number: int, done: Any, replay: Callable[[], None]) -> Callable[[], None]:
    """The last copy of the first piece is left out; its mark follows in two operations."""
    if number == 1:
        del done[-3]
    return replay


@pytest.mark.parametrize(
    ("spoil", "update", "reason", "captured", "served"),
    [
        # The first layer's only: 4 pieces of it, and 3 of the other one in each of two caches.
        (no_replay, None, "differs from its eager twin", 10, [False, True]),
        (late_replay, None, "differs from its eager twin", 10, [False, True]),
        (None, frozen_position, "differs from its eager twin", 7, [False, False]),
        (None, read_position, "not permitted when stream is capturing", 0, [False, False]),
    ],
)
def test_a_wrong_replay_is_found_and_not_used(
    spoil: Any,
    update: Any,
    reason: str,
    captured: int,
    served: list[bool],
    load_captured: Loader,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if update is not None:
        monkeypatch.setattr(FixedCache, "update", update)
    capture = Replayed(spoil)
    model = load_captured("mixtral", capture)
    prompt = tiny.tokens(6)  # the place that `frozen_position` has for its first step
    with caplog.at_level(logging.WARNING):
        assert greedy(model, prompt, 20) == greedy(tiny.model("mixtral"), prompt, 20)
    notices = [
        record.message for record in caplog.records if "CUDA graphs are not used" in record.message
    ]
    assert len(notices) == 1 and reason in notices[0], "said once"
    assert capture.captured == captured
    assert [layer.captured for layer in layers_of(model)] == served, "each by itself"
    if not any(served):
        assert capture.replayed <= 5 * PROOFS, "nothing is replayed after that"


@pytest.mark.parametrize("times", [3, 1000])
def test_a_near_tie_proves_nothing(
    times: int, load_captured: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    """Another choice of experts may be rounding for some steps, but not for ever."""
    left = [times]

    def choose_another(number: int, done: Any, replay: Callable[[], None]) -> Callable[[], None]:
        if number != 1:
            return replay
        landed = next(
            args[0]
            for func, args, *_ in done
            if "copy_" in str(func) and args[0].dtype == torch.int64
        )

        def spoiled() -> None:
            replay()
            left[0] -= 1
            if left[0] >= 0:
                landed.copy_((landed + 1) % 8)

        return spoiled

    capture = Replayed(choose_another)
    model = load_captured("mixtral", capture)
    prompt = tiny.tokens(2)
    assert greedy(model, prompt, 15) == greedy(tiny.model("mixtral"), prompt, 15)
    if times < UNDECIDED:
        assert all(layer.captured for layer in layers_of(model)) and not caplog.records
        assert left[0] == times - 14, "once for each token after the first"
    else:
        assert "chooses other experts than its eager twin" in caplog.text
        assert left[0] == times - UNDECIDED - 1


def test_the_stand_in_freezes_what_a_graph_freezes() -> None:
    capture, x, out = Replayed(), torch.arange(4.0), torch.zeros(4)
    number = 2
    with capture.aside():
        capture.begin()
        out.copy_((x * number).view(2, 2).flatten())
        replay = capture.end()
        capture.begin()
        with pytest.raises(RuntimeError, match="not permitted"):
            float(x.sum())
        capture.abandon()
    number = 5
    x.add_(1)
    replay()
    assert out.tolist() == [2, 4, 6, 8]
