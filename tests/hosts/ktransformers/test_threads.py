"""Threads that share a model in the classic host: each gets the logits that it gets alone."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import classic
import pytest
import torch
from at_once import in_threads

from hybrimoe_plugin.errors import BackendError

pytestmark = classic.needs_host
EMULATED = {
    "accelerator": "emulated",
    "prefill_device": "cuda",
    "generate_device": "cuda",
    "cache_ratio": 0.4,
}
ANSWERS = 4
"""Of each thread."""


@pytest.mark.parametrize("skip", [(), ("engine",)], ids=["loaded", "built at the first prompt"])
@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V2-Lite"])
def test_each_thread_gets_what_it_gets_alone(
    family: str, skip: tuple[str, ...], tmp_path: Path
) -> None:
    from hybrimoe_plugin.hosts.ktransformers.adapter import attach
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    with apply_patches(skip=skip):
        oracle = classic.model(family)
        rules, folder = (
            classic.rules(family, tmp_path, **EMULATED),
            classic.write(oracle, tmp_path / "model"),
        )
        built = classic.load(classic.config(family), rules, folder)
        questions = [
            (classic.tokens(13, 1), 4),
            (classic.tokens(30, 2), 6),
            (classic.tokens(5, 3), 3),
        ]
        wanted = [classic.plain_logits(oracle, *question) for question in questions]

        def answers(question: Any) -> list[torch.Tensor]:
            return [classic.host_logits(built, *question) for _ in range(ANSWERS)]

        found = in_threads([lambda asked=asked: answers(asked) for asked in questions])  # type: ignore[misc]
        for mine, logits in enumerate(found):
            for answer in logits:
                torch.testing.assert_close(answer, wanted[mine], rtol=1e-4, atol=1e-4)
        handle = attach(built)
        assert handle is not None
        handle.check_integrity()
        handle.close()


@pytest.mark.usefixtures("host")
def test_a_turn_is_a_whole_pass(tmp_path: Path) -> None:
    folder = classic.write(classic.model("Mixtral"), tmp_path / "model")
    built = classic.load(classic.config("Mixtral"), classic.rules("Mixtral", tmp_path), folder)
    order: list[tuple[int, int]] = []
    for place, layer in enumerate(built.model.layers):
        layer.register_forward_pre_hook(
            lambda *_, place=place: order.append((threading.get_ident(), place))
        )
    in_threads([lambda: classic.host_logits(built, classic.tokens(12), 6)] * 3)
    assert len({thread for thread, _ in order}) == 3
    for first in range(0, len(order), 3):
        assert order[first : first + 3] == [(order[first][0], place) for place in range(3)]
    built.hybrimoe.close()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V2-Lite"])
def test_threads_and_memory_go_with_the_model(family: str, tmp_path: Path) -> None:
    """Without close(), which users of kTransformers know nothing of."""
    rules = classic.rules(family, tmp_path)
    folder = classic.write(classic.model(family), tmp_path / "model")
    built = classic.load(classic.config(family), rules, folder)
    handle, model = built.hybrimoe, weakref.ref(built)
    handle.turns.run(lambda: None)
    del built
    gc.collect()
    assert model() is None
    with pytest.raises(BackendError, match="this model was closed"):
        handle.turns.run(lambda: None)
