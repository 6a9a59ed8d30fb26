"""How near to the card's arithmetic are prompts, and how many operations does the host issue?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from eval.gpu_check.place import Place, Row
from eval.gpu_check.stages.bandwidth import KINDS, SMALL, layer
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.device.cuda_timer import device_us
from hybrimoe_plugin.weights.layer_weights import LayerWeights

TOKENS = (128, 512, 2048)
DRY_TOKENS = (20,)
MATRIX = 8192
"""Rows and columns of the matrix product that stands for the card's arithmetic."""
REPEATS = 10
WARM_UP = 2


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`. All experts of the layer lie in slots, so nothing crosses the link."""
    peak = None if place.dry else _peak_tflops(place.device)
    for number, kind in enumerate(KINDS):
        weights = layer(SMALL, place, number)
        made = make_accelerator(place.accelerator, place.device)
        assert made is not None
        try:
            made.allocate(weights.spec.experts, [weights])
            for slot in range(weights.spec.experts):
                made.onload(slot, weights, slot)
            for tokens in DRY_TOKENS if place.dry else TOKENS:
                work = _call(made, weights, tokens)
                row = {"case": f"{SMALL.name}, {kind}, {tokens} tokens", "tokens": tokens}
                yield {**row, **_figures(place, weights, work, tokens, peak)}
        finally:
            made.close()


def _call(
    accelerator: SlotAccelerator, weights: LayerWeights, tokens: int
) -> Callable[[], torch.Tensor]:
    """A prompt's call of the layer; every expert has its share of the tokens."""
    spec = weights.spec
    device = accelerator.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, spec.hidden, generator=generator).to(device, dtype)
    scores = torch.rand(tokens, spec.experts, generator=generator)
    ids = scores.topk(spec.top_k).indices.to(device)
    routing = torch.full((tokens, spec.top_k), 1 / spec.top_k, dtype=dtype, device=device)
    slots = tuple(range(spec.experts))
    return lambda: accelerator.compute(slots, hidden, ids, routing)


def _figures(
    place: Place,
    weights: LayerWeights,
    work: Callable[[], torch.Tensor],
    tokens: int,
    peak: float | None,
) -> Row:
    """Time, share of the card's matrix products, and the device's operations of a call."""
    finite = bool(torch.isfinite(work()).all())
    if peak is None:
        return {"ok": finite}
    us = device_us(work, place.device, REPEATS, WARM_UP)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize(place.device)
    events = seen.events() or ()
    operations = sum(event.device_type.name == "CUDA" for event in events)
    spec = weights.spec
    flops = 2 * 3 * spec.hidden * spec.intermediate * spec.top_k * tokens
    return {
        "ok": finite,
        "us": us,
        "tflops": flops / us / 1e6,
        "peak_share": flops / us / 1e6 / peak,
        "device_operations": operations,
    }


def _peak_tflops(device: torch.device) -> float:
    """What torch's own product of two large matrices in bfloat16 reaches."""
    one = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
    us = device_us(lambda: one @ one, device, REPEATS, WARM_UP)
    return 2 * MATRIX**3 / us / 1e6
