"""A layer call stops the host once: for the routing decision and what comes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from engines import EXPERTS, HIDDEN, build
from kernel_cases import random_layer

from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.device.streams import HostStreams, PendingCopy

STOPS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "unique",
}


class OnDevice(torch.Tensor):
    """A tensor that counts what would stop the host if it lay on a GPU; whatever is made from one
    is one too.
    """

    stops: list[str]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", "")
        given = [*args[1:], *(kwargs or {}).values()]
        if name in STOPS or (
            name == "to" and "cpu" in map(str, given) and not any(map(is_dtype, given))
        ):
            cls.stops.append(name)
        return super().__torch_function__(function, types, args, kwargs or {})


def is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


@pytest.fixture
def stops() -> list[str]:
    OnDevice.stops = []
    return OnDevice.stops


class CountedStreams(HostStreams):
    """Copies arrive at once, or never for those that nobody waits for; stops of the host are
    counted.
    """

    def __init__(self, prompt: bool) -> None:
        self.prompt = prompt
        self.waits = 0

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        return PendingCopy(
            self, [tensor.as_subclass(torch.Tensor) for tensor in tensors], ["an event"]
        )

    def reached(self, event: object) -> bool:
        return self.prompt

    def block(self, event: object) -> None:
        self.waits += 1


@pytest.mark.parametrize("prompt", [True, False])
def test_one_wait_for_each_layer_call(
    prompt: bool, stops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions that are late are not waited for: they are left out."""
    engine, routers = build(cache_ratio=0.25, scheduler="hybrimoe")
    streams = CountedStreams(prompt)
    monkeypatch.setattr(engine.accelerator, "copy_to_host", streams.copy_to_host)
    for seed in range(12):
        for layer, router in enumerate(routers):
            plain = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))
            ids, routing = router.route(plain)
            router._scores = router._scores.as_subclass(OnDevice)
            arguments = [tensor.as_subclass(OnDevice) for tensor in (plain, ids, routing)]
            assert isinstance(engine.run(layer, *arguments), OnDevice)
    assert streams.waits == 12 * len(routers)
    assert not stops
    assert (engine.controller.counters.prefetches > 0) is prompt
    counts = engine.controller.counters
    assert counts.experts_cpu
    assert counts.experts_accelerator
    assert counts.demand_loads


def test_the_counter_counts(stops: list[str]) -> None:
    tensor = torch.ones(2).as_subclass(OnDevice)
    bool((tensor * 2).sum() > 1)
    tensor.to("cpu")
    (tensor + 1).tolist()
    tensor.nonzero()
    assert stops == ["__bool__", "to", "tolist", "nonzero"]


def test_a_prompts_tiles_and_sum_stop_nothing(stops: list[str]) -> None:
    pytest.importorskip("triton")
    accelerator = make_accelerator("emulated", torch.device("cpu"), "triton")
    assert accelerator is not None
    weights = random_layer(("Q8_0",) * 3, 64, 64, EXPERTS)
    accelerator.allocate(2, [weights])
    ids = torch.randint(0, EXPERTS, (50, 2), generator=torch.Generator().manual_seed(0))
    states, shares = (torch.zeros(50, width).as_subclass(OnDevice) for width in (64, 2))
    call = accelerator.prompt_call(weights, [{0: 1}, {2: 0}], ids.numpy(), states, shares)
    assert call is not None
    assert call.output().shape == (50, 64)
    assert not stops
