"""Experts sent by address: what the driver is asked for, what is checked first, and what makes a
device go back to the plain twin.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_streams import LazyStreams
from kernel_cases import random_call, random_layer, reference
from watched import WatchedKernels, watched_copy

from hybrimoe_plugin.compute.gpu import slot_writer
from hybrimoe_plugin.compute.gpu.direct_writer import DirectWriter
from hybrimoe_plugin.compute.gpu.host_bytes import PlainBytes, StagedBytes
from hybrimoe_plugin.compute.gpu.layer_path import LayerPath, layer_path
from hybrimoe_plugin.compute.gpu.repack_buffers import RepackBuffers
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.device.streams import LINK, HostStreams
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import Bytes, LayerWeights

EXPERTS, SLOTS = 6, 4
AS_STORED = random_layer(("F16", "F16", "F32"), 64, 32, experts=EXPERTS)
MIXED = random_layer(("Q4_0", "F16", "Q8_0"), 64, 32, experts=EXPERTS, index=1)
IN_PLANES = random_layer(("Q4_0", "Q8_0", "Q5_0"), 64, 32, experts=EXPERTS, index=2)
LAYERS = [AS_STORED, MIXED, IN_PLANES]


def make(streams: Any, host: Any = None, direct: bool = True) -> SlotAccelerator:
    nobody: Any = SimpleNamespace(touch=lambda *args, **named: None, log=[])
    watched = streams if isinstance(streams, LazyStreams) else nobody
    device = SlotAccelerator(
        torch.device("cpu"), "fake", WatchedKernels(watched), streams, host, direct=direct
    )
    device.allocate(SLOTS, LAYERS)
    return device


def compute(device: SlotAccelerator, weights: LayerWeights, slot: int, expert: int) -> None:
    """Compute one expert and compare with the reference."""
    hidden, ids, routing = random_call(3, EXPERTS, 64, 2, expert)
    table = torch.full((EXPERTS,), -1)
    table[expert] = slot
    found = device.compute((slot,), hidden, table[ids], routing)
    wanted = reference(weights, hidden, ids, routing, {expert})
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


class Recording(LazyStreams):
    """Counts what the driver is asked for, by queue."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in ("copy", "launch", "record", "wait", "enqueue", "reached", "block"):
            return value

        def counted(*args: Any) -> Any:
            if not self._nested:
                self.calls[name] += 1
            before, self._nested = self._nested, True
            try:
                return value(*args)
            finally:
                self._nested = before

        return counted

    _nested = False


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (AS_STORED, {"wait": 1, "copy": 3, "record": 2}),
        (MIXED, {"wait": 3, "copy": 3, "record": 2, "launch": 1}),
        (IN_PLANES, {"wait": 3, "copy": 3, "record": 2, "launch": 1}),
    ],
)
def test_an_onload_asks_little_of_the_driver(
    weights: LayerWeights, wanted: dict[str, int], ahead: bool
) -> None:
    """Into a slot that was computed with, as most are."""
    streams = Recording()
    device = make(streams)
    for expert in range(3):  # every repack buffer has been used
        device.onload(0, weights, expert)
        compute(device, weights, 0, expert)
    streams.synchronize()
    streams.calls.clear()
    device.onload(0, weights, 4, ahead=ahead)
    assert streams.calls == wanted
    compute(device, weights, 0, 4)


class PartlyRegistered(StagedBytes):
    """Some of the bytes can be read where they are, as on a page that the driver took."""

    def __init__(self, streams: Any, refused: Callable[[int], bool]) -> None:
        super().__init__(streams, ring=3, pinned=False)
        self._refused = refused

    def address(self, part: Bytes) -> int | None:
        start = int(part.ctypes.data)
        return None if self._refused(start) else start


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_experts_of_which_a_page_was_refused_go_the_plain_way_beside_the_others(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {int(weights.up.experts[e].ctypes.data) for weights in LAYERS for e in (1, 4)}
    streams = LazyStreams(seed)
    monkeypatch.setattr(slot_writer, "_copy_async", watched_copy(streams))
    device = make(streams, PartlyRegistered(streams, refused.__contains__))
    direct = device._transfers._direct
    assert direct is not None
    for weights in LAYERS:
        found = [direct.takes(weights, expert) for expert in range(EXPERTS)]
        assert found == [True, False, True, True, False, True]
    rng = random.Random(seed or 0)
    held: dict[int, tuple[LayerWeights, int]] = {}
    for _ in range(200):
        slot = rng.randrange(SLOTS)
        held[slot] = rng.choice(LAYERS), rng.randrange(EXPERTS)
        device.onload(slot, *held[slot], ahead=rng.random() < 0.5)
        if rng.random() < 0.2 and device.cancel(slot):
            del held[slot]
        if rng.random() < 0.5 and held:
            used = rng.choice(sorted(held))
            compute(device, held[used][0], used, held[used][1])
    assert not device.wrong_slots(held)


def writer(paths: dict[int, LayerPath], slot_bytes: int, repack_bytes: int) -> DirectWriter:
    streams = HostStreams()
    buffer = torch.zeros(SLOTS, slot_bytes, dtype=torch.uint8)
    repack = RepackBuffers(streams, repack_bytes, torch.device("cpu"))
    return DirectWriter(streams, buffer, repack, paths)


def test_nothing_is_copied_beside_slots_and_buffers() -> None:
    kernels = WatchedKernels(LazyStreams())
    for weights in LAYERS:
        layout = kernels.layout(weights.spec)
        path = layer_path(weights, layout, PlainBytes(), kernels)
        paths = {id(weights): path}
        room = layout.largest_planar
        fits = writer(paths, layout.size, room)
        for slot, expert in ((-1, 0), (SLOTS, 0), (0, -1)):
            with pytest.raises(BackendError, match=f"slot {slot} of {SLOTS} cannot take"):
                fits.write(slot, weights, expert, LINK, ())
        with pytest.raises(IndexError):
            fits.write(0, weights, EXPERTS, LINK, ())
        down = layout.parts[2]
        with pytest.raises(BackendError, match="a slot of"):
            writer(paths, down.offset + down.size - 1, room)
        if room:
            with pytest.raises(BackendError, match="a repack buffer of"):
                writer(paths, layout.size, room - 1)
        short = layout._replace(up=layout.up._replace(size=layout.up.size - 1))
        with pytest.raises(BackendError, match="expert 0: the slot takes parts of"):
            layer_path(weights, short, PlainBytes(), kernels)
        biased = layout._replace(biases=layout.up)
        with pytest.raises(BackendError, match="expert 0: the slot takes parts of"):
            layer_path(weights, biased, PlainBytes(), kernels)


@pytest.mark.parametrize("stream", [0, 7])
def test_kernels_that_know_no_whole_experts_rearrange_part_by_part_on_the_stream(
    stream: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[object] = []

    @contextmanager
    def inside(entered: object) -> Iterator[None]:
        log.append(entered)
        yield
        log.append("left")

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: handle)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    kernels = WatchedKernels(SimpleNamespace(touch=lambda *args, **named: None))  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "repack", lambda part, raw, target: log.append(part.type_name))
    path = layer_path(IN_PLANES, kernels.layout(IN_PLANES.spec), PlainBytes(), kernels)
    assert path.repack is not None
    room = torch.zeros(1 << 16, dtype=torch.uint8)
    path.repack([room] * 3, room, stream)
    kinds = ["Q4_0", "Q8_0", "Q5_0"]
    assert log == ([7, *kinds, "left"] if stream else kinds)


class Faulty(HostStreams):
    """Copies that go wrong in some way."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def copy(self, queue: str, target: int, source: int, nbytes: int) -> None:
        if self.fault == "refused":
            raise BackendError("CUDA error 1")
        if self.fault == "short":
            nbytes -= 1
        if self.fault == "nothing":
            return
        if self.fault == "prefetches" and queue != LINK:
            return
        ctypes.memmove(target, source, nbytes)

    def launch(self, queue: str, work: Callable[[int], None]) -> None:
        if self.fault == "kernel":
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        if self.fault != "never rearranged":
            super().launch(queue, work)


@pytest.mark.parametrize(
    "fault", ["", "refused", "short", "nothing", "prefetches", "kernel", "never rearranged"]
)
def test_a_device_on_which_bytes_arrive_changed_goes_the_plain_way(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = make(Faulty(fault))
    assert device._transfers._direct is not None
    device._prove(LAYERS, max(layout.largest_planar for layout in device._layouts.values()))
    assert (device._transfers._direct is None) == bool(fault)
    assert ("torch's own copies" in caplog.text) == bool(fault)
    assert not device.settle()
    assert not device.arrived(0), "the slots are empty"
    for weights in LAYERS:
        device.onload(0, weights, 3)
        compute(device, weights, 0, 3)


def test_who_asks_for_the_twin_gets_it() -> None:
    assert make(HostStreams(), direct=False)._transfers._direct is None
    streams = HostStreams()
    streams.takes_addresses = False
    assert make(streams)._transfers._direct is None
    streams = HostStreams()
    staged = make(streams, StagedBytes(streams, pinned=False))._transfers._direct
    assert staged is not None
    assert not staged.takes(MIXED, 0), "there is nothing to read in place"
    threaded = make(streams, StagedBytes(streams, pinned=False, slow=True))
    assert threaded._transfers._direct is None
    threaded.close()


def test_compute_waits_once_for_an_expert_that_arrives_at_once() -> None:
    streams = LazyStreams()
    device = make(streams)
    device.onload(1, IN_PLANES, 2)
    streams.log.clear()
    compute(device, IN_PLANES, 1, 2)
    assert streams.log == ["compute waits for repack", "stage 1", "stage 2"]
