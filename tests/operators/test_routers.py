"""Router scores belong to the experts' call that they were made for, whatever hooks call in
between.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from hybrimoe_plugin import load_model
from hybrimoe_plugin.engine import CallRecord

PROMPT = 9
ACCELERATORS: dict[str, dict[str, Any]] = {
    "none": {"accelerator": "none"},
    "emulated": {"accelerator": "emulated", "cache_ratio": 0.4},
}
BETWEEN: dict[str, Callable[[Any, Any], Any]] = {
    "shorter pass": lambda model, mlp: model(tiny.tokens(5, 1), use_cache=False),
    "pass of as many tokens": lambda model, mlp: model(tiny.tokens(PROMPT, 1), use_cache=False),
    "gate alone": lambda model, mlp: mlp.gate(torch.ones(2, 64)),
    "experts alone": lambda model, mlp: mlp.experts(
        torch.ones(12, 64), torch.zeros(12, 2).long(), torch.ones(12, 2)
    ),
}
"""What a hook between gate and experts calls, by model and MoE block."""


@pytest.fixture(scope="module", params=ACCELERATORS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    path = tiny.write(tmp_path_factory.mktemp("model"), "mixtral", types=lambda name: "F32")
    choices = {"dtype": "float32", "cpu_backend": "torch", **ACCELERATORS[request.param]}
    made = load_model(None, path, progress=False, **choices)[0]
    yield made
    made.hybrimoe.close()


def check_scores(calls: list[CallRecord]) -> None:
    """They name the experts that were chosen by them."""
    for call in calls:
        if call.scores is not None:
            best = call.scores.argsort(axis=1)[:, ::-1][:, : call.topk_ids.shape[1]]
            assert (np.sort(best) == np.sort(call.topk_ids)).all()


@pytest.mark.parametrize("between", BETWEEN)
@torch.no_grad()
def test_a_hook_on_the_gate_may_call_the_model(between: str, model: Any) -> None:
    prompt, mlp = tiny.tokens(PROMPT), model.model.layers[1].mlp
    wanted = model(prompt).logits
    calls: list[CallRecord] = []
    model.hybrimoe.record(calls.append)
    inside: list[int] = []

    def call(*_: object) -> None:
        if not inside:
            inside.append(1)
            BETWEEN[between](model, mlp)
            inside.clear()

    hook = mlp.gate.register_forward_hook(call)
    torch.testing.assert_close(model(prompt).logits, wanted)
    hook.remove()
    model.hybrimoe.record(None)
    check_scores(calls)
    # Experts that are called alone have no scores, and whose call they interrupt loses its own.
    assert sum(call.scores is None for call in calls) == (2 if between == "experts alone" else 0)


@torch.no_grad()
def test_a_call_that_failed_leaves_nothing(model: Any) -> None:
    gate, seen = model.model.layers[1].mlp.gate, []

    def fail(_gate: object, _args: object, output: tuple[torch.Tensor, ...]) -> None:
        seen.append(weakref.ref(output[0]))
        raise KeyboardInterrupt

    hook = gate.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(tiny.tokens(PROMPT))
    hook.remove()
    model(tiny.tokens(3))
    gc.collect()
    assert [logits() for logits in seen] == [None]
