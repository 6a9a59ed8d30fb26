"""CPU / accelerator split: what is chosen, that nothing is overtaken on the way, and that the text
is the same.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_streams import LazyStreams
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hybrimoe_plugin.compute.gpu import host_bytes
from hybrimoe_plugin.device.streams import COMPUTE, LINK, HostStreams
from hybrimoe_plugin.errors import BackendError, ConfigError, FlashError
from lever_ext import target as targets
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.flash.dram_plan import plan_dram
from lever_ext.flash.pack import FlashPack, block_memory
from lever_ext.operators.transfer import LayerTransfer
from lever_ext.placement import device as devices
from lever_ext.placement import split_stream
from lever_ext.placement.choose import DEVICE_RING, choose
from lever_ext.placement.device import TargetDevice, make_device
from lever_ext.placement.measure import Measured
from lever_ext.placement.pinned import PinnedBuffers
from lever_ext.placement.split import LayerCosts, Place, Rings, best_of, choose_places, pass_us
from lever_ext.placement.split_stream import SplitStream
from lever_ext.target import FlashTarget, load_target
from lever_ext.tree.policies import make_policy

CPU, COPIED, STAYS = Place.CPU, Place.COPIED, Place.STAYS
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 10}
PLACES = (
    (STAYS, STAYS, STAYS, STAYS),
    (STAYS, STAYS, CPU, CPU),
    (STAYS, COPIED, CPU, COPIED),
    (COPIED, COPIED, COPIED, COPIED),
    (CPU, COPIED, CPU, COPIED),
    (CPU, CPU, COPIED, CPU),
)


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(seed))


def budget_for(path: Path, places: tuple[Place, ...], share: float) -> int:
    """Between the least that works and everything."""
    pack = FlashPack.open(path)
    whole = plan_dram(pack, None).nbytes
    layers, experts = pack.blocks("layer"), pack.blocks("expert")
    fixed = sum(block.nbytes for block in pack.blocks("resident"))
    least = fixed + 2 * block_memory(layers) + 4 * block_memory(experts)
    pack.close()
    return int(least + share * (whole - least))


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> LazyStreams:
    """Copies run as late as their events allow, and every two uses of a buffer must be in
    an order.
    """
    streams = LazyStreams(7)
    monkeypatch.setattr(devices, "HostStreams", lambda: streams)
    acquire, send = SplitStream.acquire, split_stream._send

    def watched_acquire(self: SplitStream, layer: int) -> Any:
        slot, tensors = acquire(self, layer)
        if self.places[layer] is COPIED:
            for tensor in tensors.values():
                streams.touch(tensor, write=False, compute=True)
        return slot, tensors

    def watched_send(source: torch.Tensor, target: torch.Tensor) -> None:
        streams.touch(source, write=False)
        streams.touch(target[: source.numel()], write=True)
        send(source, target)

    monkeypatch.setattr(SplitStream, "acquire", watched_acquire)
    monkeypatch.setattr(split_stream, "_send", watched_send)
    return streams


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "share", "places"),
    [
        *(("llama", 0.0, places) for places in PLACES),
        ("llama", 0.6, PLACES[2]),
        ("llama", 0.6, PLACES[3]),
        ("mixtral", 0.1, PLACES[1]),
        ("mixtral", 0.1, PLACES[2]),
        ("qwen2_moe", 0.0, PLACES[4]),
    ],
)
def test_the_text_is_the_same_wherever_layers_compute(
    family: str,
    share: float,
    places: tuple[Place, ...],
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    lazy: LazyStreams,
) -> None:
    """A missing edge computes with the weights of another layer, or is a race."""
    plain = plain_models[family]
    draft = LanguageModelDraft(low_bit_copy(plain, 3, 32))
    budget = budget_for(packs[family], places, share)
    target = load_target(
        packs[family], dram_budget=budget, device="emulated", vram_budget="1GiB", places=places
    )
    gate = ExitGate(ExitPredictor(plain.get_output_embeddings().weight.detach(), 2, 0.0, ""),
                    PruneSettings(threshold=0.15, least_nodes=1))  # fmt: skip
    for seed, pruned in ((0, False), (1, True)):
        target.set_gate(gate if pruned else None)
        decoder = LeverDecoding(draft, make_policy("fixed", 8), target, prune="always")
        found = target.model.generate(prompt(seed), custom_generate=decoder, **GREEDY)
        assert torch.equal(found, plain.generate(prompt(seed), **GREEDY))
        decoder.close()
    assert COPIED not in places or f"{COMPUTE} waits for {LINK}" in lazy.log
    target.close()


@pytest.mark.usefixtures("lazy")
def test_a_pass_that_was_cut_off_leaves_nothing_behind(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    class Interrupt(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Interrupt

    want = plain_models["llama"].generate(prompt(0), **GREEDY)
    for places in PLACES[2:]:
        target = load_target(
            packs["llama"], dram_budget=budget_for(packs["llama"], places, 0.0), device="emulated",
            vram_budget="1GiB", places=places,
        )  # fmt: skip
        for layer in (1, 2, 3):
            hook = target.model.model.layers[layer].layer.mlp.register_forward_hook(stop)
            with pytest.raises(Interrupt):
                target.model.generate(prompt(1), **GREEDY)
            hook.remove()
            assert torch.equal(target.model.generate(prompt(0), **GREEDY), want)
        target.close()


def test_a_truncated_pack_is_a_typed_error_and_later_passes_may_work(
    plain_models: dict[str, Any], packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (CPU, COPIED, COPIED, COPIED)
    target = load_target(
        packs["llama"],
        dram_budget=budget_for(packs["llama"], places, 0.0),
        device="emulated",
        vram_budget="1GiB",
        places=places,
    )
    with monkeypatch.context() as patch:
        patch.setattr(target.pack, "check", lambda *_: (_ for _ in ()).throw(FlashError("damaged")))
        with pytest.raises(FlashError, match="damaged"):
            target.model.generate(prompt(0), **GREEDY)
    want = plain_models["llama"].generate(prompt(0), **GREEDY)
    assert torch.equal(target.model.generate(prompt(0), **GREEDY), want)
    target.close()


def test_measured_end_to_end(plain_models: dict[str, Any], packs: dict[str, Path]) -> None:
    """Whatever is decided on this machine, with real costs of an accelerator that is the CPU
    itself.
    """
    for family in ("llama", "mixtral"):
        budget = budget_for(packs[family], (CPU,), 0.0)
        target = load_target(
            packs[family], dram_budget=budget, device="emulated", vram_budget="64MiB"
        )
        assert target.split is None or target.split.pass_us < target.split.cpu_us
        want = plain_models[family].generate(prompt(0), **GREEDY)
        assert torch.equal(target.model.generate(prompt(0), **GREEDY), want)
        target.close()


def test_an_accelerator_that_holds_no_layer_is_left_alone(
    packs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    target = load_target(packs["llama"], device="emulated", vram_budget="1KiB")
    assert target.split is None and target.transfer is None and "hold no layer" in caplog.text
    target.close()


def test_hidden_states_masks_and_kv_change_sides_with_the_layers() -> None:
    """Torch's own fake tensors refuse operations on tensors of two devices, without having the
    second one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    there = [False, True, True, False]
    transfer = LayerTransfer(torch.device("cuda:0"), there)

    def toy(index: int, weight: torch.Tensor) -> Any:
        def layer(
            hidden: torch.Tensor, position_embeddings: Any, cache: DynamicCache, **named: Any
        ) -> torch.Tensor:
            cos, sin = position_embeddings
            state = torch.matmul(hidden, weight) * cos + sin
            keys, values = cache.update(state.unsqueeze(1), state.unsqueeze(1), index)
            shares = torch.matmul(state, keys.squeeze(1).transpose(1, 2)) + named["attention_mask"]
            return torch.matmul(shares, values.squeeze(1))

        return layer

    with FakeTensorMode():
        layers = [
            toy(i, torch.empty(8, 8, device="cuda:0" if away else "cpu"))
            for i, away in enumerate(there)
        ]
        with pytest.raises(RuntimeError, match="two (different )?devices"):
            torch.empty(2, device="cuda:0") + torch.empty(2)
        cache = DynamicCache()
        for step in range(3):
            hidden, rotary = torch.empty(1, 5, 8), (torch.empty(1, 5, 8), torch.empty(1, 5, 8))
            named = {
                "attention_mask": torch.empty(1, 5, 5 + 5 * step),
                "position_embeddings": rotary,
                "cache": cache,
            }
            for index, layer in enumerate(layers):
                hidden = transfer.run(index, layer, (hidden,), named)
                assert (hidden.device.type == "cuda") == (there[index] and index < 3)
            assert [layer.keys.device.type == "cuda" for layer in cache.layers] == there
            # KV that another split left on the other side comes along.
            for layer, side in ((cache.layers[1], "cpu"), (cache.layers[3], "cuda:0")):
                layer.keys, layer.values = layer.keys.to(side), layer.values.to(side)


COSTS = st.builds(
    LayerCosts,
    read_us=st.sampled_from([0.0, 100.0, 1000.0]),
    copy_us=st.sampled_from([10.0, 80.0, 400.0, 3000.0]),
    cpu_us=st.sampled_from([20.0, 90.0, 500.0]),
    device_us=st.sampled_from([5.0, 60.0, 700.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(COSTS, min_size=1, max_size=6),
    hop=st.sampled_from([0.0, 30.0]),
    stays=st.integers(0, 2),
)
def test_what_is_chosen_is_near_the_best_and_never_behind_the_cpu(
    layers: list[LayerCosts], hop: float, stays: int
) -> None:
    stays, rings = min(stays, len(layers)), Rings(3, 3, hop)
    kept = [STAYS] * stays
    found = choose_places(layers, stays, rings)
    rest = len(layers) - stays
    best = min(
        pass_us(layers, [*kept, *places], rings)
        for places in itertools.product((CPU, COPIED), repeat=rest)
    )
    alone = pass_us(layers, [CPU] * len(layers), rings)
    assert found.pass_us <= pass_us(layers, [*kept, *[CPU] * rest], rings) + 1e-6
    assert (
        found.pass_us == pytest.approx(pass_us(layers, found.places, rings))
        and found.pass_us <= 1.25 * best
    )
    chosen = best_of([found], alone)
    assert chosen is None or chosen.pass_us < alone


def test_a_pass_is_its_slowest_queue() -> None:
    rings = Rings(3, 3, 7.0)

    def us(cost: LayerCosts, place: Place, count: int = 10) -> float:
        return pass_us([cost] * count, [place] * count, rings)

    assert us(LayerCosts(100, 10, 20, 5), CPU) == pytest.approx(1000)  # reads hide computing
    assert us(LayerCosts(100, 10, 20, 5), COPIED) == pytest.approx(1000)
    assert us(LayerCosts(10, 10, 100, 5), CPU) == pytest.approx(1000)
    assert us(LayerCosts(10, 100, 100, 5), COPIED) == pytest.approx(
        1000, rel=0.03
    )  # the link is busy all the time
    assert us(LayerCosts(10, 100, 100, 5), STAYS) == pytest.approx(10 * 5 + 2 * 7)
    mixed = pass_us([LayerCosts(0, 9, 50, 5)] * 4, [CPU, STAYS, STAYS, CPU], rings)
    assert mixed == pytest.approx(2 * 50 + 2 * 5 + 2 * 7)


def test_the_accelerator_is_filled_with_layers_and_never_overfilled(packs: dict[str, Path]) -> None:
    pack = FlashPack.open(packs["llama"])
    layers, budget = pack.blocks("layer"), budget_for(packs["llama"], (CPU,), 0.0)
    quick = Measured((LayerCosts(1000, 100, 300, 30),) * 4, 1.0, head_cpu_us=500, head_device_us=20)
    slow = Measured(
        (LayerCosts(1000, 100, 300, 3000),) * 4, 1.0, head_cpu_us=20, head_device_us=500
    )
    last = 0
    for free in range(0, 3 * sum(block.nbytes for block in layers), 4096):
        found = choose(pack, budget, quick, free, 8192, None)
        assert choose(pack, budget, slow, free, 8192, None) is None
        if found is None:
            continue
        copied = any(place is COPIED for place in found.places)
        used = sum(block.nbytes for block in layers[: found.stays]) + (8192 if found.head else 0)
        assert used + (DEVICE_RING * block_memory(layers) if copied else 0) <= free
        assert found.stays >= last and found.pass_us < found.cpu_us
        last = found.stays
        assert "live there" in found.line("cuda:0")
    assert last == 4 and found is not None and found.head
    pack.close()


class FakeRuntime:
    """The CUDA runtime's registrations."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.ranges: dict[int, int] = {}

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:  # noqa: N802
        assert start % 4096 == size % 4096 == 0 and flags == 1 and start not in self.ranges
        if not self.refuse:
            self.ranges[start] = size
        return int(self.refuse)

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        del self.ranges[start]
        return 0


@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_buffers_are_pinned_while_a_cuda_device_computes(
    family: str,
    refuse: bool,
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = FakeRuntime(refuse)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(host_bytes, "_clear_error", lambda device: None)
    made = TargetDevice(
        torch.device("cpu"), HostStreams(), 1 << 30, PinnedBuffers(torch.device("cpu"))
    )
    monkeypatch.setattr(targets, "make_device", lambda *_: made)
    places = (STAYS, CPU, COPIED, COPIED)
    with caplog.at_level(logging.WARNING):
        target: FlashTarget = load_target(
            packs[family],
            dram_budget=budget_for(packs[family], places, 0.3),
            device="cuda",
            places=places,
        )
    buffers = [
        *target.stream.inner.buffers,
        *(target.experts.buffers if target.experts is not None else ()),
    ]
    assert buffers and ("cannot be registered" in caplog.text) == refuse
    assert runtime.ranges == (
        {} if refuse else {b.bytes.data_ptr(): b.bytes.numel() for b in buffers}
    )
    want = plain_models[family].generate(prompt(0), **GREEDY)
    assert torch.equal(target.model.generate(prompt(0), **GREEDY), want)
    target.close()
    assert not runtime.ranges


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_device("cpu") is None
    for name in ("gpu", "cuda:", "cuda:x", "tpu:0"):
        with pytest.raises(ConfigError, match="cpu, cuda, cuda:N or emulated"):
            make_device(name)
    with pytest.raises(ConfigError, match="vram_budget"):
        make_device("emulated")
    monkeypatch.setattr(devices, "cuda_refusal", lambda: "torch sees no CUDA device")
    with pytest.raises(BackendError, match=r"no CUDA device; use --device cpu"):
        make_device("cuda")
    monkeypatch.setattr(devices, "cuda_refusal", lambda: None)
    monkeypatch.setattr(devices, "CudaStreams", lambda device: HostStreams())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    made = make_device("cuda:1")
    assert (
        made is not None
        and made.free_bytes == 900
        and made.pins is not None
        and made.label == "cuda:1"
    )
    limited = make_device("cuda", "500B")
    assert (
        limited is not None
        and limited.free_bytes == 500
        and limited.device == torch.device("cuda:0")
    )
    with pytest.raises(BackendError, match="there are 2"):
        make_device("cuda:2")
