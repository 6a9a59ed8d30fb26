"""The text is the same wherever layers compute, and nothing is overtaken on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_streams import LazyStreams

from hybrimoe_plugin.device.streams import COMPUTE, LINK
from hybrimoe_plugin.errors import FlashError
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.placement import device as devices
from lever_ext.placement import split_stream
from lever_ext.placement.split import Place
from lever_ext.placement.split_stream import SplitStream
from lever_ext.target import load_target
from lever_ext.tree.policies import make_policy
from tests.lever.helpers import prompt
from tests.lever.placement.helpers import COPIED, CPU, GREEDY, PLACES, budget_for


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
