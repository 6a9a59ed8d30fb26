"""Backends whose work costs nothing: kernels and a CPU that compute nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from eval.host_path.driver import Driver
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout, slot_layout
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.engine.clock import WallClock
from hybrimoe_plugin.weights.layer_weights import LayerWeights


class FreeKernels:
    """Kernels on the layout of the fused ones, which do nothing.

    Args:
        driver: is told what they read and write.

    Attributes:
        launched: called at the first stage of every launch; for measuring.
    """

    name = "free"

    def __init__(self, driver: Driver) -> None:
        self.launched: Callable[[], None] | None = None
        self._driver = driver

    def refusal(self, spec: ExpertSpec) -> str | None:
        return None

    def capturable(self) -> FreeKernels:
        return self

    def layout(self, spec: ExpertSpec) -> SlotLayout:
        return slot_layout(spec, planar=True)

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        if self._driver.edges is not None:
            self._driver.use(raw.data_ptr(), part.size, write=False)
            self._driver.use(target.data_ptr(), part.size, write=True)

    def repacker(self, parts: tuple[Part, ...]) -> Callable[..., None]:
        def repack(arrived: Sequence[torch.Tensor], slot: torch.Tensor, stream: int) -> None:
            if self._driver.edges is None:
                return
            name = self._driver.named(stream)
            for part, raw in zip(parts, arrived, strict=True):
                self._driver.use(raw.data_ptr(), part.size, False, name)
                self._driver.use(slot.data_ptr() + part.offset, part.size, True, name)

        return repack

    def gate_up(self, call: SlotCall) -> None:
        if self.launched is not None:
            self.launched()
        if self._driver.edges is not None:
            self._read(call, (call.layout.gate, call.layout.up))

    def down(self, call: SlotCall, activations: None) -> torch.Tensor:
        if self._driver.edges is not None:
            self._read(call, (call.layout.down,))
        hidden = call.hidden
        return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)

    def read_all(self, buffer: torch.Tensor, layout: SlotLayout, slots: Iterable[int]) -> None:
        """As a captured launch does that finds its slots on the device."""
        for slot in slots:
            for part in layout.parts:
                start = buffer[slot].data_ptr() + part.offset
                self._driver.use(start, part.size, write=False)

    def _read(self, call: SlotCall, parts: Sequence[Part]) -> None:
        for slot in call.slots:
            for part in parts:
                start = call.buffer[slot].data_ptr() + part.offset
                self._driver.use(start, part.size, write=False)


class FreeCPU:
    """A CPU backend that has computed everything at once.

    Attributes:
        submitted: called at the beginning of every task; for measuring.
    """

    name = "free"
    workers = 0

    def __init__(self) -> None:
        self.submitted: Callable[[], None] | None = None
        self._output = torch.empty(0)

    def add_layer(self, weights: LayerWeights) -> None:
        self._output = torch.zeros(1, weights.spec.hidden)

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        if self.submitted is not None:
            self.submitted()
        if len(hidden) != len(self._output):
            self._output = torch.zeros(hidden.shape)

    def sync(self) -> torch.Tensor:
        return self._output

    def abandon(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def quick_addition() -> Iterator[None]:
    """Let the sum of two equal shapes cost what starting a kernel costs.

    torch works out the result's shape and type in Python on the `meta` device, for 300 us. The
    other operations between graphs take about 1 us there.
    """
    library = torch.library.Library("aten", "IMPL", "Meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one already
        library.impl("add.Tensor", _add, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _add(one: torch.Tensor, other: Any, *, alpha: Any = 1) -> torch.Tensor:
    if not isinstance(other, torch.Tensor) or one.shape != other.shape:
        return torch._refs.add(one, other, alpha=alpha)
    return one if one.dtype == other.dtype else torch._refs.add(one, other, alpha=alpha)


class DeviceClock(WallClock):
    """Real time and, added to it, the time that a device would have taken.

    Policies then see layers that are as far apart as on a card: transfers are in flight, and the
    link has time to prefetch.
    """

    def __init__(self) -> None:
        self._added_us = 0.0

    def now_us(self) -> float:
        return super().now_us() + self._added_us

    def pass_by(self, us: float) -> None:
        """Let the device take so long."""
        self._added_us += us
