"""int8 kernels take over only where they prove themselves."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from kernel_cases import random_layer

from eval.kernel_cases.shapes import MODEL_SHAPES, TYPE_SHAPES, Shape
from hybrimoe_plugin.compute.gpu import slot_accelerator
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.formats.description import INTEGERS
from hybrimoe_plugin.compute.gpu.kernels.int8.random_slots import fill_randomly
from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout, from_planes, slot_layout
from hybrimoe_plugin.weights.dequant import dequantize

pytest.importorskip("triton")
from hybrimoe_plugin.compute.gpu.kernels.int8 import proof
from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

CPU = torch.device("cpu")
SHAPE = Shape("small", ("Q4_K", "Q5_K", "Q8_0"), 256, 64, 3, 2)
FLOATS = Shape("small", ("Q8_0", "BF16", "F16"), 64, 64, 3, 2)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small tile as for a large one."""
    monkeypatch.setattr(
        Int8Decode, "blocks", lambda self, layout, top_k, others: Blocks(64, 4, 256, 2, 1, 1)
    )
    monkeypatch.setattr(Blocks, "of", lambda layout, top_k: Blocks(64, 4, 256, 1))


def slots(shape: Shape) -> tuple[SlotLayout, torch.Tensor]:
    torch.manual_seed(0)
    layout = slot_layout(shape.spec, planar=True)
    return layout, torch.zeros(3, layout.size, dtype=torch.uint8)


def proved(shape: Shape = SHAPE, activations: str = "auto") -> TritonKernels:
    layout, buffer = slots(shape)
    kernels = TritonKernels(CPU, activations=activations)
    kernels.prove([(layout, shape.top_k)], buffer)
    return kernels


@pytest.mark.usefixtures("large_tiles")
def test_they_take_over_where_all_agree(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert proved()._uses_int8(slots(SHAPE)[0])
    assert "they are used" in caplog.text


@pytest.mark.usefixtures("large_tiles")
def test_without_being_asked_or_without_slots_nothing_is_proved() -> None:
    layout, buffer = slots(SHAPE)
    assert not proved(activations="float")._uses_int8(layout)
    kernels = TritonKernels(CPU, activations="auto")
    assert not kernels._uses_int8(layout)
    kernels.prove([(layout, 2)], buffer[:0])
    assert not kernels._uses_int8(layout)
    assert TritonKernels(CPU, activations="int8")._uses_int8(layout)


@pytest.mark.usefixtures("large_tiles")
def test_layers_without_int8_types_stay_as_they_are() -> None:
    layout, _ = slots(FLOATS)
    assert not proved(FLOATS)._uses_int8(layout)


def wrong_bits(self: Int8Decode, *args: Any) -> None:
    """The instructions alone give another last bit."""
    gate_up(self, *args)
    if self is not TWIN:
        args[1][0, 3] = torch.nextafter(args[1][0, 3], torch.tensor(2.0))


def wrong_zero(self: Int8Decode, *args: Any) -> None:
    """Both ways miss one column's product."""
    gate_up(
        self,
        args[0]._replace(hidden=args[0].hidden.index_fill(1, torch.tensor([7]), 0.0)),
        *args[1:],
    )


def wrong_slot(self: Int8Decode, call: SlotCall, *args: Any) -> None:
    down(self, call._replace(slot_ids=call.slot_ids.clamp(min=0)), *args)


def failing(self: Int8Decode, *_args: Any) -> None:
    raise RuntimeError("out of resources")


gate_up, down = Int8Decode.gate_up, Int8Decode.down
TWIN = Int8Decode(asm=False)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(
    ("stage", "fault", "message"),
    [
        ("gate_up", wrong_bits, "gate and up of Q4_K and Q5_K: not the bits"),
        ("gate_up", wrong_zero, "off on values held in int8"),
        ("down", wrong_slot, "down of Q8_0: "),
        ("down", failing, "out of resources"),
    ],
)
def test_faults_keep_activations_in_floating_point(
    stage: str,
    fault: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Int8Decode, stage, fault)
    monkeypatch.setattr(proof, "Int8Decode", lambda asm: TWIN)
    kernels = proved()
    assert not kernels._uses_int8(slots(SHAPE)[0])
    assert message in caplog.text
    assert "stay in floating point" in caplog.text


@pytest.mark.parametrize("kind", INTEGERS)
def test_random_experts_have_weights_of_a_usual_size(kind: str) -> None:
    if kind not in GGMLQuantizationType.__members__:
        pytest.skip(f"this gguf release does not know {kind}")
    torch.manual_seed(0)
    layout = slot_layout(Shape("small", (kind, kind, kind), 256, 256, 3, 2).spec, planar=True)
    found = torch.zeros(2, layout.size, dtype=torch.uint8)
    fill_randomly(found, layout)
    for part in (layout.gate, layout.up, layout.down):
        values = dequantize(from_planes(found[1, part.span], kind), kind, (256, 256))
        assert values.isfinite().all()
        size = float(values.square().mean().sqrt())
        assert 0.03 < size < 0.12
        # Four bits around 8 are -1/2 in the mean, of a spread of 4.6.
        assert abs(float(values.mean())) < 0.15 * size


def test_an_accelerator_proves_kernels_before_it_tunes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = make_accelerator("emulated", CPU)
    assert device is not None
    layer = random_layer(("Q8_0",) * 3, 64, 64)
    device.allocate(2, [layer])
    calls: list[Any] = []
    kernels = SimpleNamespace(
        prove=lambda shapes, buffer: calls.append((shapes, len(buffer))),
        tune=lambda layout, *_: calls.append(layout),
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(slot_accelerator, "cuda_timer", lambda _device: None)
    device._tune(kernels, [layer])
    layout = device.kernels.layout(layer.spec)
    assert calls == [(((layout, layer.spec.top_k),), 2), layout]
    device.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*MODEL_SHAPES, *TYPE_SHAPES], ids=lambda shape: str(shape[:2]))
def test_a_card_proves_every_type_and_the_models_own_shapes(shape: Shape) -> None:
    device = torch.device("cuda:0")
    layout = slot_layout(shape.spec, planar=True)
    buffer = torch.empty(shape.top_k, layout.size, dtype=torch.uint8, device=device)
    proof.check([(layout, shape.top_k)], buffer, TritonKernels(device), Int8Decode(asm=True))
